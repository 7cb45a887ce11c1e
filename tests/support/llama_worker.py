"""Runs llama.cpp in a process of its own: logits of one prompt, plain and under each of some control vector files.

Usage: python llama_worker.py SITE MODEL OUTPUT < request, where SITE is a folder with llama-cpp-python, MODEL a GGUF
file, and the request JSON: `ids`, the prompt's tokens, and `files`. OUTPUT becomes a numpy archive: `plain`, the logits
of every position, for each file by its place `steered_0`, ..., those under it, and `taken`, whether llama.cpp took it.

The files are read by llama.cpp's own `common_control_vector_load`, the function behind `--control-vector`. It is C++
without a C interface, so its arguments are laid out by hand, for libstdc++ on x86-64 Linux.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


class _Text(ctypes.Structure):
    """std::string."""

    _fields_ = [("data", ctypes.c_char_p), ("size", ctypes.c_size_t), ("rest", ctypes.c_char * 16)]


class _LoadInfo(ctypes.Structure):
    """common_control_vector_load_info."""

    _fields_ = [("strength", ctypes.c_float), ("fname", _Text)]


class _Vector(ctypes.Structure):
    """std::vector."""

    _fields_ = [("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("capacity", ctypes.c_void_p)]


class _ControlVector(ctypes.Structure):
    """common_control_vector_data."""

    _fields_ = [("n_embd", ctypes.c_int), ("data", _Vector)]


class Llama:
    """A model in llama.cpp, on one thread, with keys and values in float32."""

    def __init__(self, site: Path, model: Path) -> None:
        sys.path.append(str(site))  # last, so that none of the environment's own packages is shadowed
        import llama_cpp

        self._api: Any = llama_cpp
        self._common = ctypes.CDLL(str(site / "lib" / "libllama-common.so"))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 128
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._layers = llama_cpp.llama_model_n_layer(self._model)
        self._width = llama_cpp.llama_model_n_embd(self._model)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def logits(self, ids: list[int]) -> np.ndarray:
        """(pos, vocabulary)."""
        api = self._api
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        found = np.ctypeslib.as_array(api.llama_get_logits(self._context), shape=(len(ids), self._vocabulary)).copy()
        api.llama_batch_free(batch)
        return found

    def apply(self, file: str) -> bool:
        """Put a control vector file on the model, as llama.cpp's programs do for `--control-vector`.

        Returns whether llama.cpp could read it; if not, the model is left as it was.
        """
        name = file.encode()
        info = _LoadInfo(1.0, _Text(name, len(name)))
        begin = ctypes.addressof(info)
        infos = _Vector(begin, begin + ctypes.sizeof(info), begin + ctypes.sizeof(info))
        found = _ControlVector()
        load = getattr(self._common, LOADER)
        load.restype = None
        load(ctypes.byref(found), ctypes.byref(infos))
        if found.n_embd == -1:
            return False
        floats = ctypes.cast(found.data.begin, ctypes.POINTER(ctypes.c_float))
        length = (found.data.end - found.data.begin) // ctypes.sizeof(ctypes.c_float)
        # Full length, as llama.cpp would keep an earlier file's directions of the layers beyond.
        whole = (ctypes.c_float * (self._width * self._layers))(*floats[:length])
        if self._api.llama_set_adapter_cvec(self._context, whole, len(whole), self._width, 1, self._layers) != 0:
            raise RuntimeError(f"llama.cpp cannot apply {file}")
        return True


def main() -> None:
    site, model, output = map(Path, sys.argv[1:])
    request = json.load(sys.stdin)
    llama = Llama(site, model)
    found = {"plain": llama.logits(request["ids"])}
    taken = []
    for place, file in enumerate(request["files"]):
        taken.append(llama.apply(file))
        if taken[-1]:
            found[f"steered_{place}"] = llama.logits(request["ids"])
    found["taken"] = np.array(taken)
    np.savez(output, **found)


if __name__ == "__main__":
    main()
