"""Packed weights: how they are stored (`formats`), made (`pack`), multiplied (`linear`), and distributed (`plan`)."""
