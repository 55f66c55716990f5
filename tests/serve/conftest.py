import pytest
from tiny_gguf import write_tiny

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def chatty(library, tmp_path_factory):
    """A random model with a chat template, and a profile beside it."""
    from fasa_gguf.gguf.file import GGUFFile
    from fasa_gguf.gguf.shape import model_shape
    from fasa_gguf.speed.random_model import synthetic_profile

    path = tmp_path_factory.mktemp("serve") / "chatty.gguf"
    write_tiny(path, chat_template=TEMPLATE)
    synthetic_profile(*model_shape(GGUFFile(path)), seed=2).save(path.with_suffix(".fasa.json"))
    return path
