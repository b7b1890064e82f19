"""The embedded backbone and the recipe that made it: ``make backbone``, or its steps one by one,

    python -m lora_dae.backbone.studio autoencoder --minutes 60 [--photos FOLDER]
    python -m lora_dae.backbone.studio denoiser --minutes 150 [--photos FOLDER]
    python -m lora_dae.backbone.studio card

Each step goes on where an earlier, killed or finished, call left off. ``weights/`` is the result: an
ordinary diffusers folder.
"""
