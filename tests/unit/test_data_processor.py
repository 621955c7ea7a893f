"""The canonical processor call: token ids, pixels, chat templates, responses, and folders that lack something."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from examples.quickstart.model_folder import CHAT_TEMPLATE, SPECIAL
from megatron_papo.config import Config, DataConfig
from megatron_papo.data import load_processor
from megatron_papo.data.chat_template import ChatTemplate, TemplateFailed, chat_template
from megatron_papo.data.conversation import find_form, turns_of
from megatron_papo.data.processor import ImageTooExtreme
from megatron_papo.data.template_worker import environment
from megatron_papo.generation.reference_model import expected_shapes, read_config
from megatron_papo.model.family import family_named
from megatron_papo.model.shape import ModelShape
from megatron_papo.parity.transformers_side import HuggingFace
from megatron_papo.sft import Demonstrations
from megatron_papo.training.session import check_vocabulary
from tests.support.tiny import PIXELS, make_tiny_folder

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


@pytest.mark.parametrize(
    ("family", "grids", "patch_dim"),
    [
        ("qwen2_5_vl", [[1, 8, 4], [1, 4, 2]], 3 * 2 * 14 * 14),  # 112 x 56 and 56 x 28 pixels
        ("qwen3_vl", [[1, 6, 4], [1, 4, 2]], 3 * 2 * 16 * 16),  # 96 x 64 and 64 x 32 pixels
    ],
)
def test_prompt_equals_the_structured_rendering_of_transformers(tmp_path, family, grids, patch_dim):
    images, (least, most) = [picture(70, 100), picture(30, 60, seed=1)], PIXELS[family]
    folder = make_tiny_folder(tmp_path, family=family)
    data = DATA.model_copy(update={"min_pixels": least, "max_pixels": most})
    inputs = load_processor(folder, data).encode("<image>\nLeft of <image>?", images)
    reference = AutoProcessor.from_pretrained(folder)
    content = [
        {"type": "image"}, {"type": "text", "text": "\nLeft of "}, {"type": "image"}, {"type": "text", "text": "?"},
    ]  # fmt: skip
    text = reference.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = reference(text=[text], images=images, return_tensors="pt")
    assert inputs.token_ids_S.tolist() == expected["input_ids"][0].tolist()
    assert torch.equal(inputs.pixel_values_PD, expected["pixel_values"])
    assert inputs.grid_thw_I3.tolist() == grids
    num_patches = sum(height * width for _, height, width in grids)
    assert inputs.pixel_values_PD.shape == (num_patches, patch_dim) and inputs.pixel_values_PD.dtype == torch.float32
    assert inputs.token_ids_S.dtype == torch.int64
    assert inputs.token_ids_S.tolist().count(IDS["<|image_pad|>"]) == num_patches // 4


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
        "<|im_start|>system\nYou see.<|im_end|>\n<|im_start|>user\nWhat?\n\nThink.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "user\n What? \n<|im_end|>" in load_processor(folder, DATA).render(" What? \n")  # the question alone, as is


def test_pixel_bounds_come_from_the_config(folder):
    small = load_processor(folder, DATA).encode("<image>", [picture(300, 280)])
    large = load_processor(folder, DATA.model_copy(update={"min_pixels": 200_704, "max_pixels": 1_003_520}))
    assert small.grid_thw_I3.tolist() == [[1, 6, 8]]  # 84 x 112
    assert large.encode("<image>", [picture(300, 280)]).grid_thw_I3.tolist() == [[1, 32, 34]]  # 448 x 476


def test_a_token_without_a_row_is_refused(folder, tmp_path):
    """An added word, one far beyond the others, and an image token with another number."""
    shape = ModelShape.from_folder(folder)
    check_vocabulary(load_processor(folder, DATA), shape)
    size = shape.language.vocab_size
    for number, token_id in enumerate((size, size - 1, size + 50)):
        odd = copy_folder(folder, tmp_path / str(number))
        tree = json.loads((odd / "tokenizer.json").read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tree["added_tokens"].append({"id": token_id, "content": "<answer>", "special": True, **flags})
        (odd / "tokenizer.json").write_text(json.dumps(tree))
        processor = load_processor(odd, DATA)
        found = processor.tokenizer.convert_tokens_to_ids("<answer>")
        if found < size:
            check_vocabulary(processor, shape)
            assert found not in shape.banned_ids(processor.num_words)
            continue
        with pytest.raises(
            ValueError, match=rf"^model.path: .*: tokenizer has {found + 1} words, vocab_size is {size}$"
        ):
            check_vocabulary(processor, shape)
    with pytest.raises(ValueError, match=r"image_token_id is 7 in config.json, 261 in the tokenizer"):
        check_vocabulary(load_processor(folder, DATA), replace(shape, image_token_id=7))


def test_pixels_without_settings_are_those_of_transformers_own_processor(folder, tmp_path):
    """Called plainly, whatever the folder's files say of areas; a setting replaces the one it names."""
    file = "processor_config.json"
    given = json.loads((folder / file).read_text())
    given["image_processor"].pop("size")
    for number, areas in enumerate(({"size": {"shortest_edge": 3136, "longest_edge": 9408}}, {"max_pixels": 6272}, {})):
        own = copy_folder(folder, tmp_path / str(number))
        (own / file).write_text(json.dumps(given | {"image_processor": given["image_processor"] | areas}))
        reference = AutoProcessor.from_pretrained(own).image_processor
        processor = load_processor(own, DATA.model_copy(update={"min_pixels": None, "max_pixels": None}))
        for image in (picture(30, 40), picture(200, 100)):
            expected = reference(images=[image], return_tensors="pt")
            pixel_values_PD, grid_thw_I3 = processor.pixel_values([image])
            assert torch.equal(grid_thw_I3, expected["image_grid_thw"])
            assert torch.equal(pixel_values_PD, expected["pixel_values"])
        least, most = processor.pixel_bounds
        assert (least, most) == (reference.size["shortest_edge"], reference.size["longest_edge"])
        assert load_processor(own, DATA.model_copy(update={"max_pixels": None})).pixel_bounds == (784, most)
    with pytest.raises(
        ValueError, match=r"^data.min_pixels: data.min_pixels=99999999 exceeds the \d+ of .*max_pixels$"
    ):
        load_processor(own, DATA.model_copy(update={"min_pixels": 99_999_999, "max_pixels": None}))
    sizes = given["image_processor"] | {"size": {"height": 224, "width": 224}}
    (own / file).write_text(json.dumps(given | {"image_processor": sizes}))
    with pytest.raises(ValueError, match=r"^model.path: the image processor of .* names no area for data.max_pixels: "):
        load_processor(own, DATA.model_copy(update={"max_pixels": None}))


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


@pytest.mark.parametrize(
    "written, prefix",
    [("<think>", "<think>"), ("<think>\n", "<think>\n"), ("<think>\n\n</think>\n\n", ""), ("", ""), ("Well,", "")],
)
def test_a_think_block_that_the_template_leaves_open_begins_the_answer(folder, tmp_path, written, prefix):
    opening = copy_folder(folder, tmp_path)
    start = "<|im_start|>assistant\n"
    template = TEXT_ONLY_TEMPLATE.replace("{{ '" + start, "{{ '" + start + written)
    (opening / "chat_template.jinja").write_text(template)
    for instruction in ("", "Reason inside <think></think>, or <think>"):  # what the user writes opens nothing
        processor = load_processor(opening, DATA.model_copy(update={"instruction": instruction}))
        assert processor.render("7").endswith(start + written) and processor.response_prefix == prefix


ASKS = "Reason inside <think></think>."
THINK, ENDED = 263, 264


@pytest.fixture(scope="module")
def with_tags(tmp_path_factory):
    """A folder whose vocabulary has a token for each think tag, and a template that opens an answer as given."""
    known = make_tiny_folder(tmp_path_factory.mktemp("tags"), family="qwen3_vl")

    def make(opening):
        folder = copy_folder(known, tmp_path_factory.mktemp("opening"))
        tree = json.loads((folder / "tokenizer.json").read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tree["added_tokens"] += [
            {"id": THINK, "content": "<think>"} | flags,
            {"id": ENDED, "content": "</think>"} | flags,
        ]
        (folder / "tokenizer.json").write_text(json.dumps(tree))
        text_or_parts = "{% if message.content is string %}" + WORD + "{% else %}" + PARTS + "{% endif %}"
        (folder / "chat_template.jinja").write_text(template(text_or_parts, opening))
        return known, folder

    return make


def test_think_tags_are_plain_text_where_the_template_does_not_write_them(with_tags):
    """As in a vocabulary without them, for the certificate too; what a model writes with them is still read."""
    known, folder = with_tags("<|im_start|>assistant\n")
    data = DATA.model_copy(update={"instruction": ASKS})
    processor, plain = load_processor(folder, data), load_processor(known, data)
    problem, answer = "<image>2+2?", "<think>4</think> \\boxed{4}"
    assert torch.equal(processor.text_ids(problem, 1), plain.text_ids(problem, 1))
    assert processor.encode_response(answer) == plain.encode_response(answer)
    theirs = HuggingFace(None, folder, data, ())
    found = theirs._processor(text=[theirs._render("2+2?")], return_tensors="pt")["input_ids"][0]
    assert torch.equal(found, processor.text_ids("2+2?", 0))
    assert processor.decode([THINK, *plain.encode_response("4"), ENDED]) == "<think>4</think>"
    assert processor.num_words == ENDED + 1 and processor.response_prefix == ""


def test_a_template_that_opens_the_block_has_its_tokens_and_answers_go_on_from_there(with_tags, tmp_path):
    _, folder = with_tags("<|im_start|>assistant\n<think>\n")
    processor = load_processor(folder, DATA.model_copy(update={"instruction": ASKS}))
    ids = processor.text_ids("<image>2+2?", 1).tolist()
    assert ids[-2:] == [THINK, *processor.answer_ids("\n")] and ids.count(THINK) == 2 and ids.count(ENDED) == 1
    rest = "4</think> \\boxed{4}"
    for answer in (rest, f"<think>{rest}", f"<think>\n{rest}"):
        assert processor.behind_prefix(answer) == rest
        assert processor.encode_response(answer) == processor.encode_response(rest)
    assert processor.response_prefix + rest == f"<think>\n{rest}"
    assert processor.answer_ids(rest).count(ENDED) == 1

    (tmp_path / "train.jsonl").write_text(json.dumps({"problem": "2+2?", "response": f"<think>\n{rest}"}))
    data = DATA.model_copy(update={"train": str(tmp_path / "train.jsonl")})
    demonstrations = Demonstrations(Config(data=data), processor)
    (rollout,) = demonstrations.group(demonstrations.prompt(0)).rollouts
    assert (rollout.response_ids, rollout.text) == (processor.encode_response(rest), rest)


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


TEMPLATES = (
    CHAT_TEMPLATE,
    TEXT_ONLY_TEMPLATE,
    "{% for m in messages %}\n  {% if loop.index > 9 %}{% break %}{% endif %}\n{{ m | tojson(indent=1) }}\n"
    "{% endfor %}",
    "{% generation %}{{ bos }}{{ eos_token }}{{ pad_token }}{{ additional_special_tokens }}{% endgeneration %} ",
    "{{ tools }}{{ documents }}{{ messages[0].content | trim | upper }}{{ strftime_now('%%') }}{{ x is defined }}",
    "{%- set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n * 2 }}",
)


@pytest.mark.parametrize("text", TEMPLATES, ids=map(str, range(len(TEMPLATES))))
def test_the_worker_renders_what_transformers_renders(folder, text):
    tokenizer = load_processor(folder, DATA).tokenizer
    for content in ('é \ud83d\ude00 \u2028\\ "x"\n', "<|image_pad|>" * 1000, "\x00\x7f", ""):
        turns = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": content}]
        for more in (True, False):
            expected = tokenizer.apply_chat_template(
                turns, chat_template=text, tokenize=False, add_generation_prompt=more
            )
            found = chat_template(text).render(turns, add_generation_prompt=more, **tokenizer.special_tokens_map)
            assert found == expected


HOSTILE = {
    "wide": ("{{ 'a' * (10 ** 10) }}", "takes too much memory"),
    "padded": ("{{ '%9999999999d' % 1 }}", "takes too much memory"),
    "long": ("{% for i in range(9) %}{{ 'a' * 2000000 }}{% endfor %}", "writes 1800000. letters"),
    "refusing": ("{{ raise_exception('only\\ntext') }}", "TemplateError: only text$"),
    "out of the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "doubled": ("{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
                "takes (too much|more than)"),
    "for ever": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
    "in C": ("{{ 7 ** (9 ** (messages | length * 9)) }}", "takes more than"),
}  # fmt: skip


def test_a_template_takes_neither_time_nor_memory(monkeypatch):
    monkeypatch.setattr("megatron_papo.data.chat_template.LIMIT_S", 0.2)
    cases = "".join(f"{{% elif messages[0].content == '{kind}' %}}{text}" for kind, (text, _) in HOSTILE.items())
    template = ChatTemplate(f"{{% if messages[0].content == 'good' %}}{cases}{{% endif %}}fine")

    def render(content):
        return template.render([{"role": "user", "content": content}], add_generation_prompt=True)

    for kind, (_, message) in HOSTILE.items():
        with pytest.raises(TemplateFailed, match=message) as caught:
            render(kind)
        assert "\n" not in str(caught.value)
    assert render("good") == "fine", "another worker, where the one before was ended"
    with pytest.raises(TemplateFailed, match="TemplateSyntaxError"):
        ChatTemplate("{% for").render([], add_generation_prompt=True)
    with pytest.raises(TemplateFailed, match="has 1048577 letters, at most"):
        chat_template("x" * (2**20 + 1))


def test_what_a_template_fails_with_is_the_rows(folder, tmp_path):
    odd = copy_folder(folder, tmp_path)
    (odd / "chat_template.jinja").write_text(
        CHAT_TEMPLATE + "{% if 'x' in messages[0].content %}{{ 1 + 'a' }}{% endif %}"
    )
    processor = load_processor(odd, DATA)
    with pytest.raises(ValueError, match=rf"^model.path: the chat template of {odd}: TypeError: "):
        processor.encode("x?", [])
    assert processor.encode("y?", []).token_ids_S.numel()
    (odd / "chat_template.jinja").write_text("{{ messages[0].content.replace('<|image_pad|>', '') }}<|im_end|>")
    with pytest.raises(TemplateFailed, match="writes 0 image tokens for 2"):
        load_processor(odd, DATA).encode("<image>", [picture(56, 56)])


PARTS = "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
PARTS += "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
WORD = "{{ message.content }}"


def template(body, opening="<|im_start|>assistant\n"):
    """Qwen's, with another way to write a turn's content."""
    turn = f"<|im_start|>{{{{ message.role }}}}\n{body}<|im_end|>\n"
    return f"{{% for message in messages %}}{turn}{{% endfor %}}{{% if add_generation_prompt %}}{opening}{{% endif %}}"


LOSES = "drops or changes the question"
ODD_TEMPLATES = {
    "parts": (template(PARTS), None),
    "parts, else an error": (
        template("{% if message.content is string %}{{ raise_exception('no text') }}{% endif %}" + PARTS), None,
    ),
    "think block opened": (template(WORD, "<|im_start|>assistant\n<think>\n"), None),
    "always opened": (template(WORD, "") + "{{ '<|im_start|>assistant\n' }}", None),
    "question dropped": (template("go on"), "writes 0 image tokens for 2|" + LOSES),
    "text dropped": (template("{{ '<|image_pad|>' * message.content.count('<|image_pad|>') }}"), LOSES),
    "text in capitals": (template(WORD.replace(" }}", " | upper }}")), LOSES),
    "written twice": (template(WORD + "\n" + "{{ message.content.replace('<|image_pad|>', '') }}"), "question twice"),
    "pictures first": (
        template("{{ '<|image_pad|>' * message.content.count('<|image_pad|>') }}"
                 "{{ message.content.replace('<|image_pad|>', '') }}"), LOSES,
    ),
    "pictures dropped": (template("{{ message.content.replace('<|image_pad|>', '') }}"), "writes 0 image tokens for 2"),
    "system dropped": ("{% set messages = messages[-1:] %}" + template(WORD), "system turn"),
    "opened twice": (template(WORD, "<|im_start|>assistant\n<|im_start|>assistant\n"), "assistant's turn twice"),
    "always and again": (
        template(WORD, "") + "<|im_start|>assistant\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "assistant's turn twice",
    ),
    "failing": ("{{ messages[0].nothing.at_all }}", "UndefinedError"),
}  # fmt: skip


def render_here(text):
    """In this process, as the worker does: these templates are not hostile."""
    made = environment().from_string(text)

    def render(turns, opened):
        try:
            return made.render(messages=turns, add_generation_prompt=opened)
        except Exception as error:
            raise TemplateFailed(f"{type(error).__name__}: {error}") from None

    return render


@pytest.mark.parametrize("kind", ODD_TEMPLATES)
def test_a_template_gives_the_question_back_or_is_refused(kind):
    text, fault = ODD_TEMPLATES[kind]
    render, system = render_here(text), "Be kind." if fault is None or "system" in kind else None
    if fault is not None:
        with pytest.raises(TemplateFailed, match=fault) as caught:
            find_form(render, system)
        assert "\n" not in str(caught.value)
        return
    form = find_form(render, system)
    assert form == ("parts" if "parts" in kind else "text")
    start = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n" + ("<think>\n" if "think" in kind else "")
    for question in ("Is {'it'} 2\n+ 2?", "<image>What?\n<image>"):
        said = question.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        assert render(turns_of(question, system, form), True) == f"{start}{said}{end}"


@pytest.mark.parametrize("opening", [":", "A:", "\n", ""])
def test_a_short_opening_is_no_double_one(opening):
    assert find_form(render_here(template(WORD, opening)), None) == "text"


def test_a_template_of_parts_serves_prompts_and_one_that_loses_them_does_not(folder, tmp_path):
    odd = copy_folder(folder, tmp_path)
    (odd / "chat_template.jinja").write_text(ODD_TEMPLATES["parts, else an error"][0])
    processor, known = load_processor(odd, DATA), load_processor(folder, DATA)
    for problem in ("2+2?", "<image>What?"):
        assert processor.render(problem) == known.render(problem)
    assert processor.end_of_turn_id == IDS["<|im_end|>"]
    (odd / "chat_template.jinja").write_text(ODD_TEMPLATES["text dropped"][0])
    with pytest.raises(TemplateFailed, match=rf"^model.path: the chat template of {odd}: {LOSES}"):
        load_processor(odd, DATA).encode("2+2?", [])


def test_a_row_that_a_template_changes_is_told(folder, tmp_path):
    odd = copy_folder(folder, tmp_path)
    (odd / "chat_template.jinja").write_text(template("{{ message.content.split('</think>')[-1] }}"))
    processor = load_processor(odd, DATA)
    assert "why?" in processor.render("why?")
    with pytest.raises(TemplateFailed, match=LOSES):
        processor.render("what does </think> mean?")


@pytest.mark.parametrize("place", ["tokenizer_config.json", "additional_chat_templates", "chat_template.json"])
def test_of_several_templates_the_default_one(folder, tmp_path, place):
    """As transformers takes it, and as the certificate's own processor does."""
    several = copy_folder(folder, tmp_path)
    (several / "chat_template.jinja").unlink()
    known = load_processor(folder, DATA).render("<image>2+2?")

    def write(**templates):
        if place == "tokenizer_config.json":
            settings = json.loads((folder / place).read_text())
            settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
            (several / place).write_text(json.dumps(settings))
        elif place == "chat_template.json":
            (several / place).write_text(json.dumps({"chat_template": templates.get("default")}))
        else:
            (several / place).mkdir(exist_ok=True)
            (several / "chat_template.jinja").unlink(missing_ok=True)
            for name, text in templates.items():
                file = several / ("chat_template.jinja" if name == "default" else f"{place}/{name}.jinja")
                file.write_text(text)

    write(default=CHAT_TEMPLATE, tool_use="tools")
    processor = load_processor(several, DATA)
    assert processor.render("<image>2+2?") == known
    assert processor.encode("2+2?", []).token_ids_S.numel()
    theirs = HuggingFace(None, several, DATA, ())
    assert theirs._render("<image>2+2?") == known
    assert theirs._render("<image>2+2?", "Be exact.") == processor.render("<image>2+2?", "Be exact.") != known
    if place != "chat_template.json":
        write(chat=CHAT_TEMPLATE, tool_use="tools")
        with pytest.raises(ValueError, match=r"chat templates by name, chat, tool_use, and none that is named default"):
            load_processor(several, DATA)


def test_no_code_of_a_folder_is_run(folder, tmp_path):
    """Named in every file that may name code; a class that transformers does not know is one line."""
    evil = copy_folder(folder, tmp_path)
    ran = tmp_path / "ran"
    (evil / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    known = load_processor(folder, DATA).encode("2+2?", []).token_ids_S
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        file = evil / name
        tree = json.loads(file.read_text()) if file.exists() else {"image_processor_type": "Qwen2VLImageProcessor"}
        kinds = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor", "AutoModel")
        tree["auto_map"] = dict.fromkeys(kinds, "evil.Evil")
        file.write_text(json.dumps(tree))
    assert torch.equal(load_processor(evil, DATA).encode("2+2?", []).token_ids_S, known)
    tree = json.loads((evil / "config.json").read_text())
    for section in (tree, tree["text_config"], tree["vision_config"]):
        section |= {"attn_implementation": "evil/kernels", "_attn_implementation": "evil/kernels"}
    (evil / "config.json").write_text(json.dumps(tree))
    config = read_config(evil, family_named("qwen2_5_vl"))
    parts = (config, config.text_config, config.vision_config)
    assert [part._attn_implementation for part in parts] == ["sdpa"] * 3, "no kernel from the hub"
    expected_shapes(config)
    for name, key in (("processor_config.json", "processor_class"), ("tokenizer_config.json", "tokenizer_class")):
        file = evil / name
        tree = json.loads(file.read_text()) | {key: "Evil"}
        file.write_text(json.dumps(tree))
        try:
            load_processor(evil, DATA)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith("model.path: ")
    assert not ran.exists()


def test_files_that_would_not_end_and_odd_ends_are_refused(folder, tmp_path):
    odd = copy_folder(folder, tmp_path)
    os.mkfifo(odd / "added_tokens.json")
    with pytest.raises(ValueError, match=r"^model.path: .*/added_tokens.json: not a regular file of at most"):
        load_processor(odd, DATA)
    (odd / "added_tokens.json").unlink()
    for text in ("[", "[]", '{"eos_token_id": "2"}', '{"eos_token_id": [true]}', '{"eos_token_id": -1}', "[" * 10**5):
        (odd / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"^{odd}/generation_config.json: ") as caught:
            _ = load_processor(odd, DATA).eos_ids
        assert "\n" not in str(caught.value)
    (odd / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    assert load_processor(odd, DATA).eos_ids == (IDS["<|im_end|>"], 3, 5)


def test_patches_of_odd_sizes_are_refused(folder, tmp_path):
    odd = copy_folder(folder, tmp_path)
    file = odd / "processor_config.json"
    tree = json.loads(file.read_text())
    for key, value in (("patch_size", 10**6), ("merge_size", 0), ("temporal_patch_size", -1), ("patch_size", "14")):
        file.write_text(json.dumps({**tree, "image_processor": {**tree["image_processor"], key: value}}))
        with pytest.raises(ValueError, match=r"^model.path: ") as caught:
            load_processor(odd, DATA)
        assert "\n" not in str(caught.value)
