"""Code common to the diffusion methods: the checkpoint, its UNet as a chain, latents, prompts and pictures."""
