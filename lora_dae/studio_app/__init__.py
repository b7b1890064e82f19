"""The preview page in the browser: a finished run (or the frozen backbone) and a few sliders."""
