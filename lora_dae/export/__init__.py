"""What a finished run gives to other programs: adapter files, merged checkpoints, the model card."""
