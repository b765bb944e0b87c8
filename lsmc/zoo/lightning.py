"""Lightning attention:  M ← e^{log_a} M + kᵀv,  o = q M.

q, k (B, T, H, K); v (B, T, HV, V); log_a (HV,), log decay, ≤ 0: published as −(8 / H) (1 − l / L) h for head h of layer l.
Qin et al. 2024, "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention" (arXiv 2405.17381).
"""

from lsmc import LSM, Constant, k, outer, v

lightning = LSM("lightning", decay=Constant("log_a"), update=outer(k, v))
