"""The slow reference of axes, positions and angles in images and videos: a loop or a formula for each, in float64.

Written from the papers and HoPE's code (github.com/hrlics/HoPE at 85b76c0), before ropewalk had any of it.
"""

import numpy as np


def axes(method, d, section):
    """Axis of each pair (0 time, 1 height, 2 width), and which pairs stand still."""
    t, h, w = section
    stopped = np.zeros(d // 2, bool)
    if method in ("mrope", "mrope_v5"):
        return np.repeat([0, 1, 2], [t, h, w]), stopped
    if method in ("videorope", "hope"):
        stopped[h + w :] = method == "hope"
        return np.concatenate([1 + np.arange(h + w) % 2, np.zeros(t, int)]), stopped
    axis = np.zeros(d // 2, int)  # one-dimensional
    if method == "mrope_interleaved":
        axis[1 : 3 * h : 3], axis[2 : 3 * w : 3] = 1, 2
    return axis, stopped


def positions(method, segments, gamma=1.0):
    """float64 (3, tokens) of a list of segments: a number of text tokens, or (frames, height, width)."""
    out, p = [], 0.0
    for segment in segments:
        if isinstance(segment, int) or method == "rope1d":
            n = segment if isinstance(segment, int) else int(np.prod(segment))
            out.append(np.stack([p + np.arange(n)] * 3))
            p += n
            continue
        frames, height, width = segment
        rows = []
        for k in range(frames):
            for i in range(height):
                for j in range(width):
                    if method in ("mrope", "mrope_v5"):
                        rows.append((p + k, p + i, p + j))
                    else:
                        t = p + gamma * k
                        rows.append((t, t + i - (height - 1) // 2, t + j - (width - 1) // 2))
        out.append(np.array(rows).T)
        if method == "mrope":
            p = out[-1].max() + 1
        elif method == "mrope_v5":
            p += max(height, width)
        else:
            p += gamma * (frames - 1) + 1
    return np.concatenate(out, 1)


def angles(method, d, theta, section, position):
    """float64 (tokens, d/2) of positions (3, tokens)."""
    axis, stopped = axes(method, d, section)
    return position[axis].T * np.where(stopped, 0.0, theta ** (-2.0 * np.arange(d // 2) / d))
