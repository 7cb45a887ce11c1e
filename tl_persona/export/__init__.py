"""How steering vectors leave for other programs, and come back.

- `control_vectors`: GGUF files of llama.cpp.
- `peers`: the objects of steering-vectors and repeng, the folders of rotalabs-steer.
- `forward_hook`: a function for a decoder layer of plain transformers.
- `repositories`, `cards`: the Hugging Face hub.

These functions know no class of this package: the methods of `SteeringVectorSet` and `PersonaVectorStore` call them.
"""
