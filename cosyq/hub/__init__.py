"""The only package that talks to a network: repositories of the Hub, read and written, and single files of the web."""
