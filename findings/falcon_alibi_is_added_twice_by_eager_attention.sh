#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, CPU): Falcon with ALiBi computes another function with attn_implementation="eager".
#
# Valid input: one model with alibi=True, the same weights and token ids, both attention implementations. Seen, as the largest
# difference of the first block's output relative to its norm (random weights, 20 tokens, float32):
#   rotary positions (alibi=False)   below 1e-5
#   ALiBi, blocks one after another  0.26
#   ALiBi, parallel blocks           0.074
#   ALiBi, eager with zeros for what it adds itself: below 1e-5 again
# The mask that the model makes holds the biases already; the eager attention adds them to the scores once more, and sdpa,
# the default, does not. 5.9.0 and 5.23.0 do the same. It matters to whoever reads attention patterns, which only eager gives
# (output_attentions=True): patterns and residuals are then not those that the model has otherwise.
#
# Exits 0 while this is so, 1 when it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0 transformers==5.24.0

cat >"$folder/both_ways.py" <<'PY'
import torch
import transformers
from transformers.models.falcon.modeling_falcon import FalconAttention


def model(implementation, **settings):
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=False, bias=True,
        attn_implementation=implementation, **settings,
    )
    made = transformers.FalconForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return made


def difference(**settings):
    ids = torch.randint(0, 100, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (
            model(implementation, **settings)(ids, output_hidden_states=True).hidden_states[1]
            for implementation in ("eager", "sdpa")
        )
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1)).max())


def said(name, value):
    print(f"{transformers.__version__} {name}: {'below 1e-5' if value < 1e-5 else f'{value:.2g}'}")


said("rotary", difference(alibi=False))
said("ALiBi, one after another", difference(alibi=True, parallel_attn=False))
said("ALiBi, parallel", difference(alibi=True))
forward = FalconAttention.forward
FalconAttention.forward = lambda self, *args, **more: forward(
    self, *args, **more | {"alibi": None if more["alibi"] is None else torch.zeros_like(more["alibi"])}
)
said("ALiBi, zeros in eager", difference(alibi=True))
PY
seen=$("$folder/venv/bin/python" "$folder/both_ways.py" 2>/dev/null)
echo "$seen"
expected="5.24.0 rotary: below 1e-5
5.24.0 ALiBi, one after another: 0.26
5.24.0 ALiBi, parallel: 0.074
5.24.0 ALiBi, zeros in eager: below 1e-5"
[ "$seen" = "$expected" ] || { echo "this has changed" >&2; exit 1; }
