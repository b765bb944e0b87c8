"""DeltaNet:  M ← (I − β kᵀk) M + β kᵀv = M + β kᵀ(v − k M),  o = q M.

q, k (B, T, H, K), k of norm ≤ 1; v (B, T, HV, V); beta (B, T, HV) in [0, 2).
Schlag, Irie and Schmidhuber 2021, "Linear Transformers Are Secretly Fast Weight Programmers" (arXiv 2102.11174), eq. 24;
chunk-parallel in Yang et al. 2024 (arXiv 2406.06484).
"""

from lsmc import LSM, Identity, M, k, outer, scalar, v

beta = scalar("beta")
deltanet = LSM("deltanet", decay=Identity(), update=beta * outer(k, v - k @ M))
