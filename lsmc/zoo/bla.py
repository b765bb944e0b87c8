"""Basic linear attention:  M ← M + kᵀv,  o = q M.

q, k (B, T, H, K); v (B, T, HV, V).
Katharopoulos et al. 2020, "Transformers are RNNs" (arXiv 2006.16236), without feature map and normaliser.
"""

from lsmc import LSM, Identity, k, outer, v

bla = LSM("bla", decay=Identity(), update=outer(k, v))
