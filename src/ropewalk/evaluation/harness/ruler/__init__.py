"""RULER (arXiv 2404.06654): its 13 tasks with lm-eval's texts, its authors' scoring, any length or sample count."""
