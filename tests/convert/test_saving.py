"""Converted models in folders, and in other processes."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from performers.convert import load_performer, to_performer
from tests.convert.models import (
    build,
    converted,
    favors,
    generation_inputs,
    inputs,
    output,
    padding_mask,
    small,
    token_ids,
)

FITTED = {"num_features": 16, "estimator": "data_aware"}
# Name of a case: model, options of the conversion, options of saving.
CASES = {
    "features": ("bert", {"num_features": 16}, {}),
    "tied embeddings": ("electra", {"num_features": 16, "window": 2}, {}),
    "exact terms": ("llama", {"num_features": 16, "window": 3, "sinks": 2}, {}),
    "calibrated": ("gpt2", {**FITTED, "window": 2}, {}),
    "listed keys": ("bert", {**FITTED, "window": 1, "listed_keys": 4}, {}),
    "hybrid": ("gemma3", {"num_features": 16, "layers": [-1]}, {}),
    "local layers": ("modernbert", {"num_features": 16}, {}),
    "shards": ("qwen3", {"num_features": 16}, {"max_shard_size": "10KB"}),
    "cross-attention": ("whisper", {"num_features": 16, "cross_attention": True}, {}),
    "pixels": ("vit", {"num_features": 16, "projection": "simplex"}, {}),
    # Saved under other names than those of its modules.
    "several inputs": ("llava", {"num_features": 16}, {}),
}


def case(name):
    """A converted model and its inputs."""
    architecture, options, _ = CASES[name]
    if options.get("estimator") == "data_aware":
        options = {**options, "calibration": [inputs(architecture, 4, 30, seed=7)]}
    return converted(build(architecture), **options), inputs(architecture)


def saved(name, folder):
    model, given = case(name)
    model.save_pretrained(folder, **CASES[name][2])
    return model, given


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


def succeeds(program, folder):
    command = [sys.executable, "-c", program, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result


def edit(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


REFUSED_THEN_OPENED = """
import sys
from pathlib import Path
import torch, transformers

folders = list(Path(sys.argv[1]).iterdir())
for folder in folders:
    config = transformers.AutoConfig.from_pretrained(folder)
    own = getattr(transformers, config.architectures[0])
    for opener in (transformers.AutoModel, own):
        try:
            opener.from_pretrained(folder)
        except ValueError as error:
            assert "pip install 'performers[convert]'" in str(error), error
            assert 'import performers.convert' in str(error), error
        else:
            raise SystemExit(f'{folder} was opened')
assert 'performers' not in sys.modules

from performers.convert import load_performer

for folder in folders:
    given, expected, sequences = torch.load(folder / "expected.pt")
    model = load_performer(folder)
    assert not model.training
    with torch.no_grad():
        result = model(**given)
    got = result.logits if "logits" in result else result.last_hidden_state
    assert torch.equal(got, expected), folder.name
    if sequences is not None:
        got = model.generate(given["input_ids"], max_new_tokens=6, do_sample=False)
        assert torch.equal(got, sequences), folder.name
    print(folder.name)
"""


def test_a_fresh_process_refuses_without_this_package_and_computes_the_same_with_it(tmp_path):
    """Refused in its own class as in the Auto classes; with the package, equal to the bit."""
    names = ("listed keys", "exact terms", "pixels")
    for name in names:
        model, given = saved(name, tmp_path / name)
        expected, sequences = output(model, given), None
        if name == "exact terms":
            sequences = model.generate(given["input_ids"], max_new_tokens=6, do_sample=False)
        torch.save((given, expected, sequences), tmp_path / name / "expected.pt")
    result = succeeds(REFUSED_THEN_OPENED, tmp_path)
    assert result.stdout.splitlines() == sorted(names, key=result.stdout.index)
    # Nothing is said about tensors that the original class does not know.
    assert "favor" not in result.stderr


@pytest.mark.exhaustive
def test_a_pickled_model_runs_in_a_process_that_imports_torch_alone(tmp_path):
    model, given = case("exact terms")
    given["attention_mask"] = padding_mask(2, 20, "left")
    torch.save((model, given, output(model, given)), tmp_path / "model.pt")
    program = (
        "import sys, torch\n"
        "model, given, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(model(**given).logits, expected)\n"
    )
    succeeds(program, tmp_path / "model.pt")


@pytest.mark.parametrize("name", CASES)
def test_its_own_class_opens_the_converted_model(name, folder):
    model, given = saved(name, folder)
    state = torch.get_rng_state()
    loaded = type(model).from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(loaded, type(model))
    assert torch.equal(output(loaded, given), output(model, given))
    record = json.loads((folder / "config.json").read_text())["performers"]
    assert {key: x for key, x in record.items() if key in CASES[name][1]} == CASES[name][1]
    assert (len(list(folder.glob("*.safetensors"))) > 2) is (name == "shards")
    if name in ("exact terms", "hybrid", "shards"):
        given = generation_inputs(CASES[name][0])
        sequences = (x.generate(**given, max_new_tokens=8) for x in (loaded, model))
        assert torch.equal(*sequences)
    with pytest.raises(ValueError, match="converted already"):
        to_performer(loaded, window=64)


def test_auto_classes_pipelines_and_other_heads_open_the_converted_model(folder):
    model, given = saved("listed keys", folder)
    whole = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    assert torch.equal(output(whole, given), output(model, given))
    # It is no quantized model: dtypes change, and Trainer takes it.
    assert not getattr(whole, "is_quantized", False)
    assert not hasattr(whole, "quantization_method")
    assert whole.half().float().to(torch.bfloat16).dtype == torch.bfloat16
    base = transformers.AutoModel.from_pretrained(folder)
    assert torch.equal(output(base, given), output(model.bert, given))
    # A head that the folder does not have is initialised as ever.
    labels = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert favors(labels)
    assert 0 < labels.classifier.weight.abs().max() < 1
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    features = transformers.pipeline("feature-extraction", model=str(folder))
    assert favors(features.model)
    assert len(features("word word")[0]) == 4


# peft asks transformers under a deprecated name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_peft_adapter_opens_its_converted_base(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model, given = saved("exact terms", folder)
    adapted = peft.get_peft_model(
        type(model).from_pretrained(folder),
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert favors(loaded)
    assert torch.equal(output(loaded, given), output(adapted.eval(), given))


def test_a_folder_of_an_earlier_version(folder):
    model, given = saved("calibrated", folder)
    edit(folder, lambda x: [x.pop("quantization_config"), x.pop("attn_implementation")])
    loaded = load_performer(folder)
    assert torch.equal(output(loaded, given), output(model, given))
    loaded.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    assert torch.equal(output(again, given), output(model, given))
    assert again.config.performers == model.config.performers


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
def test_folders_saved_before_the_library_was_rearranged(architecture):
    """With listed keys, with a window and sinks, and with learned features, in order."""
    saved_folder = Path(__file__).parent / "saved" / architecture
    tensors = load_file(saved_folder / "expected.safetensors")
    expected = tensors.pop("logits")
    assert torch.allclose(output(load_performer(saved_folder), tensors), expected, atol=1e-5)


class OwnModel(transformers.BertPreTrainedModel):
    """A class that transformers does not have."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.head = torch.nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids=None):
        return self.head(self.bert(input_ids).last_hidden_state)


def test_a_class_of_ones_own(folder):
    model = converted(OwnModel(build("bert").config).eval(), num_features=16)
    model.save_pretrained(folder)
    for loaded in (load_performer(folder), load_performer(folder, model_class=OwnModel)):
        assert type(loaded) is OwnModel
        assert torch.equal(loaded(token_ids(2, 20)), model(token_ids(2, 20)))


def test_parts_of_a_composite_model(folder):
    """Converted one after the other, otherwise, and saved with the whole."""
    model = small("CLIPModel")
    given = {"input_ids": token_ids(2, 20), "pixel_values": torch.rand(2, 3, 32, 32)}
    exact = model(**given).logits_per_image
    to_performer(model.vision_model, num_features=16, window=3)
    once = model(**given).logits_per_image
    assert not torch.equal(once, exact)
    model.save_pretrained(folder)
    for loaded in (load_performer(folder), transformers.AutoModel.from_pretrained(folder)):
        assert torch.equal(loaded(**given).logits_per_image, once)
        assert not favors(loaded.text_model)
    to_performer(model.text_model, num_features=32)
    model.save_pretrained(folder)
    twice = model(**given).logits_per_image
    assert torch.equal(load_performer(folder)(**given).logits_per_image, twice)
    model.vision_model.save_pretrained(folder)
    pixels = {"pixel_values": given["pixel_values"]}
    loaded = transformers.CLIPVisionModel.from_pretrained(folder)
    assert torch.equal(output(loaded, pixels), output(model.vision_model, pixels))


def test_models_of_one_configuration_do_not_disturb_each_other(folder):
    config, ids = build("bert").config, token_ids(2, 20)
    teacher, student = (transformers.BertModel(config).eval() for _ in range(2))
    before = teacher(ids).last_hidden_state
    to_performer(student, num_features=16)
    assert torch.equal(teacher(ids).last_hidden_state, before)
    teacher.save_pretrained(folder)
    assert "performers" not in json.loads((folder / "config.json").read_text())
    student.save_pretrained(folder)
    got = load_performer(folder)(ids).last_hidden_state
    assert torch.equal(got, student(ids).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_stay_float32_in_half_precision(dtype, folder):
    model, given = saved("features", folder)
    half = load_performer(folder, dtype=dtype)
    assert half.dtype == dtype
    for favor, other in zip(favors(model), favors(half), strict=True):
        assert torch.equal(favor.feature_map.weight, other.feature_map.weight)
    expected = output(model, given)
    assert (output(half, given).float() - expected).abs().max() < 0.1 * expected.abs().max()
    half.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    kinds = {".favor." in name: x.dtype for name, x in tensors.items()}
    assert kinds == {True: torch.float32, False: dtype}
    loaded = load_performer(folder)
    assert loaded.dtype == dtype
    assert torch.equal(output(loaded, given), output(half, given))


def test_loaded_dropout_stays_off(folder):
    model = build("bert", attention_probs_dropout_prob=0.3)
    with pytest.warns(UserWarning, match="switched off"):
        to_performer(model.train(), num_features=16)
    model.eval().save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_performer(str(folder))
    given = inputs("bert")
    assert torch.equal(output(loaded.train(), given), output(model, given))


def test_device_maps(folder):
    pytest.importorskip("accelerate")
    model, given = saved("exact terms", folder)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        loaded = load_performer(folder, device_map=device_map)
        assert torch.equal(output(loaded, given), output(model, given))


def lose_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if ".favor." in name)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def lose(name):
    return lambda folder: (folder / name).unlink()


def rewrite(part, **changes):
    return lambda folder: edit(folder, lambda x: (x[part] if part else x).update(changes))


# What is done to a folder, the error and its words.
DAMAGED = [
    (lose("config.json"), OSError, r"no config\.json"),
    (lose("model.safetensors"), OSError, r"model\.safetensors"),
    (lose_a_tensor, ValueError, r"have no tensor [\w.]+\.favor\."),
    (build("bert").save_pretrained, ValueError, "BertForMaskedLM that is not converted"),
    (rewrite("performers", heat=2), ValueError, r"unknown settings of its conversion, \['heat'\]"),
    (rewrite("", architectures=["My"]), ValueError, "holds a My, and no class of that name"),
    # Some releases of transformers notice it, others leave it to us.
    (rewrite("performers", num_features=32), Exception, r"ignore_mismatched|do not belong"),
]


@pytest.mark.parametrize(("damage", "error", "words"), DAMAGED)
def test_damaged_folders_are_refused(damage, error, words, folder):
    saved("features", folder)
    damage(folder)
    with pytest.raises(error, match=words):
        load_performer(folder)


def test_trainer_takes_a_loaded_model_and_goes_on_from_its_checkpoints(folder, tmp_path):
    model, _ = saved("exact terms", folder)
    rows = token_ids(8, 12)
    data = [{"input_ids": row, "labels": row} for row in rows]
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1}
    options |= {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(tmp_path / "run"), **options)
    loaded, again = (type(model).from_pretrained(folder) for _ in range(2))
    transformers.Trainer(loaded, arguments, train_dataset=data).train()
    stored = load_performer(tmp_path / "run" / "checkpoint-2")
    given = {"input_ids": rows}
    assert torch.equal(output(stored, given), output(loaded.eval(), given))
    assert not torch.equal(output(stored, given), output(model, given))
    trainer = transformers.Trainer(again, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, msg=name)
