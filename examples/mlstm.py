"""mLSTM, the matrix memory of xLSTM, with stabilised gates:  M ← e^g M + e^i kᵀv,  n ← e^g n + e^i k,
o = q M / max(|q · n|, e^{−m}).

q, k (B, T, H, K), one of them scaled by 1/√K; v (B, T, HV, V); g, i, m (B, T, HV), where raw gates f and ι give, with m_0 = 0,
m_t = max(log f_t + m_{t−1}, ι_t),  g_t = log f_t + m_{t−1} − m_t ≤ 0,  i_t = ι_t − m_t ≤ 0: no exponential exceeds 1, whatever
the raw input gate. The memory is e^{−m} times the one without stabiliser, of which o is the same; g = log f, i = ι, m = 0 is
that one. The state is the pair (M, n).
Beck et al. 2024, "xLSTM: Extended Long Short-Term Memory" (arXiv 2405.04517), eq. 19 to 27, stabilised as in eq. 15 to 17.
"""

from lsmc import LSM, M, Scalar, abs, exp, k, maximum, outer, q, scalar, v

i, m = scalar("i"), scalar("m")
readout = (q @ M) / maximum(abs(q @ M.normalizer), exp(-m))
mlstm = LSM("mlstm", decay=Scalar("g"), update=exp(i) * outer(k, v), readout=readout)
