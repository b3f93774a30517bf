"""A chain entry for every registered method, and positions far apart."""

# Every method with arguments that fit any head of 32 channels or more.
SAMPLES = {
    "abf": {"theta": 1e7},
    "pi": {"factor": 8.0},
    "ntk": {"factor": 8.0},
    "dynamic_ntk": {"factor": 8.0, "original_max_position_embeddings": 8192},
    "ntk_by_parts": {"factor": 8.0, "original_max_position_embeddings": 8192},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 8192},
    "llama3": {},
    "longrope": {"short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 8192},
    "mrrope_pro": {"factor": 8.0, "original_max_position_embeddings": 8192},
    "mrrope_uni": {"factor": 8.0, "original_max_position_embeddings": 8192},
    "cope": {"clip": "auto"},
    "hardclip": {"clip": "auto"},
    "p_rope": {"fraction": 0.75},
    "hope": {},
    "resonance": {},
    "high_frequency": {},
    "half_rope": {},
    "rope_id": {},
    "rope_id_yarn": {"factor": 8.0},
    "axes": {"layout": "alternating", "positions": "diagonal"},
    "temperature": {"exponent": 2.0},
    "nope_layers": {"every": 4},
    "log_temperature": {"length": 8192},
    "learned": {"alpha": [0.1]},
}

BESIDE = ("axes", "nope_layers", "log_temperature")  # they change no frequency


def sample(name, head_dim=128):
    arguments = {k: v * (head_dim // 2) if isinstance(v, list) else v for k, v in SAMPLES[name].items()}
    return {"method": name, **arguments}


def chain_of(name, head_dim=128):
    """The sample as a chain, behind what it needs before it."""
    before = [sample("rope_id", head_dim)] if name == "rope_id_yarn" else []
    return [*before, sample(name, head_dim)]


# as in rope/stock_process.py, which can import nothing of ours
POSITIONS = [0, 1, 2, 99, 4095, 8191, 8192, 65535, 65536, 131072, 262143, 262144]
