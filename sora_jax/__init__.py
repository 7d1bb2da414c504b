"""sora_jax: open video generation in JAX.

>>> import sora_jax
>>> video = sora_jax.load("toyworld").generate("a red circle moves left", duration=2.0)
>>> video.save("out.mp4")
"""

__version__ = "0.1.0"
