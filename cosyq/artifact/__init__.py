"""The packed artifact: a folder of safetensors and a manifest that says what each byte is and where it came from."""
