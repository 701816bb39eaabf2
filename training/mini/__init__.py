"""cosyq-mini: a small model in the published CosyVoice 3 layout, one script a stage. See README.md."""
