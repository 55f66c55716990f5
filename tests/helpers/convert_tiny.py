"""Convert Hugging Face model folders without a tokenizer to GGUF (f32), with the pinned llama.cpp's own converter.

usage: convert_tiny.py LLAMA_CPP_TREE HF_DIR [HF_DIR ...]   writes HF_DIR.gguf beside each
"""

import json
import sys
from pathlib import Path


def main(tree, *folders):
    sys.path[:0] = [str(Path(tree) / "gguf-py"), tree]
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    def no_vocabulary(self):
        self._set_vocab_none()  # the converter refuses tokenizers that it does not know
        if f"{gguf.MODEL_ARCH_NAMES[self.model_arch]}.vocab_size" not in self.gguf_writer.kv_data[0]:
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    with torch.inference_mode():
        for folder in map(Path, folders):
            config = json.loads((folder / "config.json").read_text())
            words = {"model": {"vocab": {str(i): i for i in range(config["vocab_size"])}}, "added_tokens": []}
            stub = folder / "tokenizer.json"
            if not stub.exists():  # one family counts the words there
                stub.write_text(json.dumps(words))
            hparams = ModelBase.load_hparams(folder, False)
            if config["model_type"] == "gpt_neox":  # transformers 4 had this name for it
                hparams["rotary_pct"] = config["rope_parameters"]["partial_rotary_factor"]
            found = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
            found.set_vocab = no_vocabulary
            found(folder, gguf.LlamaFileType.ALL_F32, folder.with_suffix(".gguf"), hparams=hparams).write()
            if json.loads(stub.read_text()) == words:
                stub.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
