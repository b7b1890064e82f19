"""The frozen Stable Diffusion: load, encode, decode."""
