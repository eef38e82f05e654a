"""The noise that a model itself finds in a clean latent, by DDIM inversion.

From the clean latent upwards the deterministic step of DDIM (Song et al. 2020, equation 12 with sigma 0) is taken
backwards: at level u the model splits its latent into (eps, z0), and at the next level u' the latent is
sqrt(a_u') z0 + sqrt(1 - a_u') eps. The clean latent counts as one of level 0.
"""
