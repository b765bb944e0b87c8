"""ReBased:  M ← M + φ(k)ᵀv,  z ← z + φ(k),  o = φ(q) M / (φ(q)·z + 1e-6),  φ(x) = vec(x'ᵀx'),  x' = γ ⊙ x + β.

q, k (B, T, H, K); v (B, T, HV, V); gamma, beta (K,), scale and shift of queries and keys. φ(q)·φ(k) = (q'·k')², so that
weights are positive. The state is the pair (M (B, HV, K·K, V), z (B, HV, K·K)).
Aksenov et al. 2024, "Linear Transformers with Learnable Kernel Functions are Better In-Context Models" (arXiv 2402.10644),
whose queries and keys are normalised before.
"""

from lsmc import LSM, M, k, outer, pairs, q, v, vector

gamma, beta = vector("gamma", per="layer"), vector("beta", per="layer")
query, key = pairs(gamma * q + beta), pairs(gamma * k + beta)
rebased = LSM("rebased", update=outer(key, v), readout=(query @ M) / (query @ M.normalizer + 1e-6))
