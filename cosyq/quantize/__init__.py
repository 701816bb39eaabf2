"""Packed weights: how they are stored (`formats`), made (`pack`), multiplied (`linear`), and which goes where (`plan`)."""
