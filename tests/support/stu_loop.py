"""The STU of arXiv 2312.06837, equations (4) to (6), as a loop over features and steps."""

import numpy as np


def stu_by_loop(u, phi, sigma, m_u, m_plus, m_minus=None, m_y=None):
    """Arguments and result as those of `models.ops.stu.stu`."""
    batch, length, _ = u.shape
    if isinstance(m_y, str):  # lag2
        m_y = np.stack([np.zeros((m_u.shape[2],) * 2), np.eye(m_u.shape[2])])
    features = np.zeros((2, batch, length, len(sigma), u.shape[2]))
    for t in range(length):
        for i in range(t + 1):
            features[0, :, t] += u[:, t - i, None, :] * phi[i, None, :, None]
            features[1, :, t] += (-1) ** i * u[:, t - i, None, :] * phi[i, None, :, None]
    y = np.zeros((batch, length, m_u.shape[2]))
    for t in range(length):
        for i in range(min(len(m_u), t + 1)):
            y[:, t] += u[:, t - i] @ m_u[i]
        for j in range(0 if m_y is None else min(len(m_y), t)):
            y[:, t] += y[:, t - 1 - j] @ m_y[j]
        for k in range(len(sigma) if t >= 2 else 0):
            y[:, t] += sigma[k] ** 0.25 * features[0, :, t - 2, k] @ m_plus[k]
            if m_minus is not None:
                y[:, t] += sigma[k] ** 0.25 * features[1, :, t - 2, k] @ m_minus[k]
    return y
