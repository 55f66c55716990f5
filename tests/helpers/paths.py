"""Where the checkout and the demo's model are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / "models" / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
