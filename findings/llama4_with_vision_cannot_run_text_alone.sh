#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0, CPU): Llama4ForConditionalGeneration cannot run text without an image.
#
# Valid input: token ids alone (`pixel_values` is optional). Seen:
#   5.23.0   logits of shape (1, 3, 100)
#   5.24.0   AttributeError: 'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'
# The text class, Llama4ForCausalLM, runs in both. It matters to whoever reads activations of Llama 4 for texts: the released
# checkpoints are of the class that fails.
#
# Exits 0 while this is so, 1 when it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/pip" install -qq --no-deps --target "$folder/before" transformers==5.23.0

cat >"$folder/text_alone.py" <<'PY'
import torch
import transformers

text = transformers.Llama4TextConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
)
vision = transformers.Llama4VisionConfig(
    hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
    vision_output_dim=16, projector_input_dim=16, projector_output_dim=16,
)
ids = torch.tensor([[5, 6, 7]])
both = transformers.Llama4Config(text_config=text.to_dict(), vision_config=vision.to_dict())
models = {"with vision": transformers.Llama4ForConditionalGeneration(both), "text": transformers.Llama4ForCausalLM(text)}
for name, model in models.items():
    try:
        with torch.no_grad():
            print(f"{transformers.__version__} {name}: {tuple(model.eval()(input_ids=ids).logits.shape)}")
    except Exception as error:
        print(f"{transformers.__version__} {name}: {type(error).__name__}: {error}")
PY
seen=$(
    "$folder/venv/bin/python" "$folder/text_alone.py" 2>/dev/null
    PYTHONPATH="$folder/before" "$folder/venv/bin/python" "$folder/text_alone.py" 2>/dev/null
)
echo "$seen"
expected="5.24.0 with vision: AttributeError: 'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'
5.24.0 text: (1, 3, 100)
5.23.0 with vision: (1, 3, 100)
5.23.0 text: (1, 3, 100)"
[ "$seen" = "$expected" ] || { echo "this has changed" >&2; exit 1; }
