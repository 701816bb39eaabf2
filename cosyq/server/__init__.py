"""Speech over HTTP, as OpenAI's clients ask for it. Importing it loads no torch: a speaker brings that along."""
