"""RetNet:  M ← e^{log_a} M + kᵀv,  o = q M.

q, k (B, T, H, K); v (B, T, HV, V); log_a (HV,), log decay, ≤ 0, default log(1 − 2^{−5−h}) for head h.
Sun et al. 2023, "Retentive Network" (arXiv 2307.08621), eq. 8.
"""

from math import log1p

from lsmc import LSM, Constant, k, outer, v

retnet = LSM(
    "retnet",
    decay=Constant("log_a", default=lambda heads: [log1p(-(2.0 ** (-5 - h))) for h in range(heads)]),
    update=outer(k, v),
)
