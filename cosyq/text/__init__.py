"""From a written sentence to token ids. No torch here."""
