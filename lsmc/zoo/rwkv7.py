"""RWKV7:  M ← diag(e^g) M + bᵀ(a M) + kᵀv,  o = q M.

q, k (B, T, H, K); v (B, T, HV, V); g (B, T, HV, K), log decay, ≤ 0; a, b (B, T, HV, K), published as −κ and κ ⊙ α with
|κ| = 1 and α in (0, 1). a reads the memory before its decay.
Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution" (arXiv 2503.14456), eq. 17.
"""

from lsmc import LSM, M, Vector, k, outer, v, vector

a, b = vector("a"), vector("b")
rwkv7 = LSM("rwkv7", decay=Vector("g"), update=outer(b, a @ M) + outer(k, v))
