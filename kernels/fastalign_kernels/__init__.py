"""Masked mean-pooling and contrastive loss for LLM fine-tuning. Needs torch; fused where there are Triton and a GPU.

Every function has a plain-PyTorch twin of the same signature in `fastalign_kernels.reference`, which runs on the CPU
and where Triton is not installed.
"""

from fastalign_kernels._dispatch import HAS_TRITON, why_not_triton

if HAS_TRITON:
    from fastalign_kernels.info_nce import info_nce
    from fastalign_kernels.masked_mean_pool import masked_mean_pool
    from fastalign_kernels.pooled_info_nce import pooled_info_nce
else:
    from fastalign_kernels.reference.info_nce import info_nce
    from fastalign_kernels.reference.masked_mean_pool import masked_mean_pool
    from fastalign_kernels.reference.pooled_info_nce import pooled_info_nce

__all__ = ["info_nce", "masked_mean_pool", "pooled_info_nce", "why_not_triton"]
