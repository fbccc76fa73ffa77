"""The STU of arXiv 2312.06837, equations (4) to (6), as a loop over features and steps."""

import numpy as np


def stu_by_loop(u, phi, sigma, m_u, m_plus, m_minus=None, m_y=None, lag=1):
    """Arguments and result as those of `models.ops.stu.stu`."""
    batch, length, _ = u.shape
    if m_y is None:
        m_y = 0.0
    if isinstance(m_y, float):
        m_y = m_y * np.eye(m_u.shape[2])[None]
    features = np.zeros((2, batch, length, len(sigma), u.shape[2]))
    for t in range(length):
        for i in range(t + 1):
            features[0, :, t] += u[:, t - i, None, :] * phi[i, None, :, None]
            features[1, :, t] += (-1) ** i * u[:, t - i, None, :] * phi[i, None, :, None]
    y = np.zeros((batch, length, m_u.shape[2]))
    for t in range(length):
        for i in range(min(len(m_u), t + 1)):
            y[:, t] += u[:, t - i] @ m_u[i]
        for j in range(min(len(m_y), t // lag)):
            y[:, t] += y[:, t - lag * (1 + j)] @ m_y[j]
        for k in range(len(sigma) if t >= 2 else 0):
            y[:, t] += sigma[k] ** 0.25 * features[0, :, t - 2, k] @ m_plus[k]
            if m_minus is not None:
                y[:, t] += sigma[k] ** 0.25 * features[1, :, t - 2, k] @ m_minus[k]
    return y
