"""Masked mean-pooling and contrastive loss for LLM fine-tuning. Needs torch, and Triton for the fused versions.

So far every function is its plain-PyTorch twin from `fastalign_kernels.reference`, on every device.
"""

from fastalign_kernels.reference.info_nce import info_nce
from fastalign_kernels.reference.masked_mean_pool import masked_mean_pool

__all__ = ["info_nce", "masked_mean_pool"]
