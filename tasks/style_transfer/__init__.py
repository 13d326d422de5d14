"""Style transfer: repaint a photograph in the style of a painting. One folder a method; what they share lies here."""
