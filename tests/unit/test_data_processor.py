"""The canonical processor call: token ids, pixels, chat templates, responses, and folders that lack something."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from megatron_papo.config import DataConfig
from megatron_papo.data import load_processor
from megatron_papo.data.processor import ImageTooExtreme
from tests.tiny import SPECIAL, make_tiny_folder

IDS = {token: 256 + index for index, token in enumerate(SPECIAL)}
DATA = DataConfig(min_pixels=28 * 28, max_pixels=112 * 112, instruction="")
TEXT_ONLY_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("model"))


def picture(width, height, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def test_prompt_equals_the_structured_rendering_of_transformers(folder):
    images = [picture(70, 100), picture(30, 60, seed=1)]
    inputs = load_processor(folder, DATA).encode("<image>\nLeft of <image>?", images)
    reference = AutoProcessor.from_pretrained(folder)
    content = [
        {"type": "image"}, {"type": "text", "text": "\nLeft of "}, {"type": "image"}, {"type": "text", "text": "?"},
    ]  # fmt: skip
    text = reference.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = reference(text=[text], images=images, return_tensors="pt")
    assert inputs.token_ids_S.tolist() == expected["input_ids"][0].tolist()
    assert torch.equal(inputs.pixel_values_PD, expected["pixel_values"])
    assert inputs.grid_thw_I3.tolist() == [[1, 8, 4], [1, 4, 2]]  # 112 x 56 and 56 x 28 pixels
    assert inputs.pixel_values_PD.shape == (40, 1176) and inputs.pixel_values_PD.dtype == torch.float32
    assert inputs.token_ids_S.dtype == torch.int64
    assert inputs.token_ids_S.tolist().count(IDS["<|image_pad|>"]) == 10


def test_text_only_prompt(folder):
    inputs = load_processor(folder, DATA).encode("2+2?", [])
    start, end = [IDS["<|im_start|>"]], [IDS["<|im_end|>"]]
    letters = load_processor(folder, DATA).tokenizer.get_vocab()
    user, question, line, answerer = (
        [letters[letter] for letter in text] for text in ("userĊ", "2+2?", "Ċ", "assistantĊ")
    )  # Ċ is how a byte-level vocabulary spells the end of a line
    assert inputs.token_ids_S.tolist() == start + user + question + end + line + start + answerer
    assert inputs.pixel_values_PD is None and inputs.grid_thw_I3 is None


def test_template_that_knows_only_strings(folder, tmp_path):
    text_only = copy_folder(folder, tmp_path)
    (text_only / "chat_template.jinja").write_text(TEXT_ONLY_TEMPLATE)
    processor = load_processor(text_only, DATA)
    assert processor.render("<image>How many?") == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = processor.encode("<image>How many?", [picture(56, 56)]).token_ids_S.tolist()
    assert tokens.count(IDS["<|image_pad|>"]) == 4
    assert processor.end_of_turn_id == IDS["<|im_end|>"]


def test_instruction_and_system(folder):
    with_both = DATA.model_copy(update={"instruction": "Think.", "system": "You see."})
    assert load_processor(folder, with_both).render(" What? \n") == (
        "<|im_start|>system\nYou see.<|im_end|>\n<|im_start|>user\nWhat? Think.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "user\n What? \n<|im_end|>" in load_processor(folder, DATA).render(" What? \n")  # the question alone, as is


def test_pixel_bounds_come_from_the_config(folder):
    small = load_processor(folder, DATA).encode("<image>", [picture(300, 280)])
    large = load_processor(folder, DATA.model_copy(update={"min_pixels": 200_704, "max_pixels": 1_003_520}))
    assert small.grid_thw_I3.tolist() == [[1, 6, 8]]  # 84 x 112
    assert large.encode("<image>", [picture(300, 280)]).grid_thw_I3.tolist() == [[1, 32, 34]]  # 448 x 476


def test_pixel_values_alone_are_those_of_the_prompt(folder):
    processor, images = load_processor(folder, DATA), [picture(70, 100), picture(30, 60)]
    inputs = processor.encode("<image><image>", images)
    pixel_values_PD, grid_thw_I3 = processor.pixel_values(images)
    assert torch.equal(pixel_values_PD, inputs.pixel_values_PD) and torch.equal(grid_thw_I3, inputs.grid_thw_I3)


def test_response_round_trip(folder):
    processor = load_processor(folder, DATA)
    token_ids = processor.encode_response("<think>é</think> \\boxed{ 2 }")
    assert token_ids[-1] == IDS["<|im_end|>"] and token_ids.count(IDS["<|im_end|>"]) == 1
    assert processor.decode(token_ids) == "<think>é</think> \\boxed{ 2 }"
    assert processor.eos_ids == (IDS["<|im_end|>"],)


def test_end_of_turn_is_the_templates_not_the_tokenizers(folder, tmp_path):
    base = copy_folder(folder, tmp_path)
    settings = base / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"'))
    processor = load_processor(base, DATA)
    assert processor.end_of_turn_id == IDS["<|im_end|>"]
    assert processor.eos_ids == (IDS["<|im_end|>"], IDS["<|endoftext|>"])


def test_counts_and_vision_tokens_are_refused(folder):
    processor = load_processor(folder, DATA)
    with pytest.raises(ValueError, match="2 <image> placeholders for 1 images"):
        processor.encode("<image><image>", [picture(56, 56)])
    with pytest.raises(ValueError, match=r"vision token <\|image_pad\|>"):
        processor.encode("what is <|image_pad|>?", [])
    with pytest.raises(ImageTooExtreme, match="4 x 804 pixels"):
        processor.encode("<image>", [picture(4, 804)])


def test_folders_that_lack_something(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no-such-folder is no folder"):
        load_processor(tmp_path / "no-such-folder", DATA)
    bare = copy_folder(folder, tmp_path)
    (bare / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"neither preprocessor_config.json nor processor_config.json"):
        load_processor(bare, DATA)
    mute = copy_folder(folder, tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        load_processor(mute, DATA)


def copy_folder(folder: Path, parent: Path) -> Path:
    copy = parent / "copy"
    copy.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (copy / file.name).write_bytes(file.read_bytes())
    return copy
