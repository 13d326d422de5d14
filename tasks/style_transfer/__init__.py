"""Style transfer: repaint a photograph in the style of a painting. Each method has a folder; shared code is here."""
