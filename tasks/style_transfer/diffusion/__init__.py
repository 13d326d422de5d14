"""What the diffusion methods share: a Stable Diffusion checkpoint, its UNet as a chain, latents, prompts, pictures."""
