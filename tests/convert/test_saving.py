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
from performers.nn import FavorAttention
from tests.convert import architectures
from tests.convert.architectures import (
    build,
    converted,
    generation_inputs,
    inputs,
    output,
    padding_mask,
    token_ids,
)

# Name of a case: architecture, options of the conversion, options of saving.
CASES = {
    "features": ("bert", {"num_features": 16}, {}),
    "tied embeddings": ("electra", {"num_features": 16, "window": 2}, {}),
    "exact terms": ("llama", {"num_features": 16, "window": 3, "sinks": 2}, {}),
    "calibrated": ("gpt2", {"num_features": 16, "estimator": "data_aware", "window": 2}, {}),
    "listed keys": (
        "bert",
        {"num_features": 16, "estimator": "data_aware", "window": 1, "listed_keys": 4},
        {},
    ),
    "hybrid": ("gemma3", {"num_features": 16, "layers": [-1]}, {}),
    "local layers": ("modernbert", {"num_features": 16}, {}),
    "shards": ("qwen3", {"num_features": 16}, {"max_shard_size": "10KB"}),
    "cross-attention": ("whisper", {"num_features": 16, "cross_attention": True}, {}),
    "pixels": ("vit", {"num_features": 16, "projection": "simplex"}, {}),
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


PROGRAM = """
import sys
from pathlib import Path
import torch
from performers.convert import load_performer

for folder in Path(sys.argv[1]).iterdir():
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


def test_a_fresh_process_computes_the_same_to_the_bit(tmp_path):
    for name in CASES:
        model, given = saved(name, tmp_path / name)
        expected, sequences = output(model, given), None
        if name in ("exact terms", "hybrid", "shards"):
            sequences = model.generate(given["input_ids"], max_new_tokens=6, do_sample=False)
        torch.save((given, expected, sequences), tmp_path / name / "expected.pt")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split("\n")) - {""} == set(CASES)
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
    command = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", CASES)
def test_its_own_class_opens_the_converted_model(name, folder):
    model, given = saved(name, folder)
    loaded = type(model).from_pretrained(folder)
    assert isinstance(loaded, type(model))
    assert torch.equal(output(loaded, given), output(model, given))


def test_auto_classes_pipelines_and_other_heads_open_the_converted_model(folder):
    model, given = saved("listed keys", folder)
    assert torch.equal(
        output(transformers.AutoModelForMaskedLM.from_pretrained(folder), given),
        output(model, given),
    )
    base = transformers.AutoModel.from_pretrained(folder)
    assert torch.equal(output(base, given), output(model.bert, given))
    # A head that the folder does not have is initialised as ever.
    labels = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert any(isinstance(x, FavorAttention) for x in labels.modules())
    assert 0 < labels.classifier.weight.abs().max() < 1
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    features = transformers.pipeline("feature-extraction", model=str(folder))
    assert any(isinstance(x, FavorAttention) for x in features.model.modules())
    assert len(features("word word")[0]) == 4


def test_a_peft_adapter_opens_its_converted_base(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model, given = saved("exact terms", folder)
    base = type(model).from_pretrained(folder)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert any(isinstance(x, FavorAttention) for x in loaded.modules())
    assert torch.equal(output(loaded, given), output(adapted.eval(), given))


def test_without_this_package_a_converted_folder_is_refused(tmp_path):
    """In its own class as in the Auto classes, by a sentence that says what to import."""
    for name in ("features", "exact terms", "pixels"):
        saved(name, tmp_path / name)
    program = (
        "import sys, transformers\n"
        "from pathlib import Path\n"
        "for folder in Path(sys.argv[1]).iterdir():\n"
        "    config = transformers.AutoConfig.from_pretrained(folder)\n"
        "    own = getattr(transformers, config.architectures[0])\n"
        "    for opener in (transformers.AutoModel, own):\n"
        "        try:\n"
        "            opener.from_pretrained(folder)\n"
        "        except ValueError as error:\n"
        "            assert \"pip install 'performers[convert]'\" in str(error), error\n"
        "            assert 'import performers.convert' in str(error), error\n"
        "        else:\n"
        "            raise SystemExit(f'{folder} was opened')\n"
        "assert 'performers' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_a_loaded_model_is_no_quantized_one(folder):
    """Dtypes change, and Trainer takes it, as any other model."""
    saved("features", folder)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    assert not getattr(loaded, "is_quantized", False)
    assert not hasattr(loaded, "quantization_method")
    assert loaded.half().dtype == torch.float16
    assert loaded.float().to(torch.bfloat16).dtype == torch.bfloat16


def test_a_folder_of_an_earlier_version(folder):
    model, given = saved("calibrated", folder)
    edit(
        folder,
        lambda config: [config.pop("quantization_config"), config.pop("attn_implementation")],
    )
    loaded = load_performer(folder)
    assert torch.equal(output(loaded, given), output(model, given))
    loaded.save_pretrained(folder)
    assert torch.equal(output(type(model).from_pretrained(folder), given), output(model, given))


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
def test_folders_saved_before_the_library_was_rearranged(architecture):
    """With listed keys, with a window and sinks, and with learned features, in order."""
    saved_folder = Path(__file__).parent / "saved" / architecture
    tensors = load_file(saved_folder / "expected.safetensors")
    expected = tensors.pop("logits")
    assert torch.allclose(output(load_performer(saved_folder), tensors), expected, atol=1e-5)


def test_a_loaded_model_is_not_converted_again(folder):
    saved("features", folder)
    model = type(build("bert")).from_pretrained(folder)
    with pytest.raises(ValueError, match="converted already"):
        to_performer(model, window=64)


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
    config = transformers.BertConfig(**architectures.BERT)
    model = converted(OwnModel(config).eval(), num_features=16)
    model.save_pretrained(folder)
    ids = token_ids(2, 20)
    for loaded in (load_performer(folder), load_performer(folder, model_class=OwnModel)):
        assert type(loaded) is OwnModel
        assert torch.equal(loaded(ids), model(ids))


def clip():
    sizes = architectures.SIZES
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, **sizes},
        vision_config={"image_size": 32, "patch_size": 8, **sizes},
        projection_dim=16,
    )
    torch.manual_seed(0)
    return transformers.CLIPModel(config).eval()


def test_parts_of_a_composite_model(folder):
    """Converted one after the other, otherwise, and saved with the whole."""
    model = clip()
    given = {"input_ids": token_ids(2, 20), "pixel_values": torch.rand(2, 3, 32, 32)}
    exact = model(**given).logits_per_image
    to_performer(model.vision_model, num_features=16, window=3)
    once = model(**given).logits_per_image
    assert not torch.equal(once, exact)
    model.save_pretrained(folder)
    for loaded in (load_performer(folder), transformers.AutoModel.from_pretrained(folder)):
        assert torch.equal(loaded(**given).logits_per_image, once)
        assert not any(isinstance(x, FavorAttention) for x in loaded.text_model.modules())
    to_performer(model.text_model, num_features=32)
    twice = model(**given).logits_per_image
    model.save_pretrained(folder)
    assert torch.equal(load_performer(folder)(**given).logits_per_image, twice)
    model.vision_model.save_pretrained(folder)
    loaded = transformers.CLIPVisionModel.from_pretrained(folder)
    pixels = {"pixel_values": given["pixel_values"]}
    assert torch.equal(output(loaded, pixels), output(model.vision_model, pixels))


def test_models_of_one_configuration_do_not_disturb_each_other(folder):
    config = transformers.BertConfig(**architectures.BERT)
    teacher, student = (transformers.BertModel(config).eval() for _ in range(2))
    ids = token_ids(2, 20)
    before = teacher(ids).last_hidden_state
    to_performer(student, num_features=16)
    assert torch.equal(teacher(ids).last_hidden_state, before)
    teacher.save_pretrained(folder)
    assert "performers" not in json.loads((folder / "config.json").read_text())
    student.save_pretrained(folder)
    got = load_performer(folder)(ids).last_hidden_state
    assert torch.equal(got, student(ids).last_hidden_state)


def test_a_loaded_model_saves_again(folder, tmp_path):
    model, given = saved("calibrated", folder)
    once = load_performer(folder)
    once.save_pretrained(tmp_path / "again")
    twice = load_performer(tmp_path / "again")
    assert torch.equal(output(twice, given), output(model, given))
    assert twice.config.performers == model.config.performers


def test_a_loaded_model_trains_and_saves_what_it_learnt(folder, tmp_path):
    model, given = saved("exact terms", folder)
    loaded = load_performer(folder).train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(**given, labels=given["input_ids"], use_cache=False).loss.backward()
    optimizer.step()
    loaded.eval().save_pretrained(tmp_path / "trained")
    expected = output(loaded, given)
    assert not torch.allclose(expected, output(model, given), atol=1e-3)
    assert torch.equal(output(load_performer(tmp_path / "trained"), given), expected)


def test_loading_does_not_touch_the_random_numbers_of_the_caller(folder):
    saved("features", folder)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_performer(folder)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_half_precision_keeps_the_features_in_float32(dtype, folder):
    model, given = saved("features", folder)
    half = load_performer(folder, dtype=dtype)
    assert half.dtype == dtype
    for name, buffer in model.named_buffers():
        if ".favor." in name:
            other = half.get_buffer(name)
            assert other.dtype == torch.float32
            assert torch.equal(other, buffer)
    expected = output(model, given)
    assert (output(half, given).float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_saving_in_half_precision_keeps_the_features_in_float32(folder):
    model, given = case("features")
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    kinds = {".favor." in name: x.dtype for name, x in tensors.items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    loaded = load_performer(folder)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(output(loaded, given), output(model, given))


def test_shards(folder):
    model, given = saved("shards", folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(output(load_performer(folder), given), output(model, given))


def test_loaded_dropout_stays_off(folder):
    model = build("bert", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.0)
    with pytest.warns(UserWarning, match="switched off"):
        to_performer(model, num_features=16)
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_performer(folder)
    given = inputs("bert")
    assert torch.equal(output(loaded.train(), given), output(model, given))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(device_map, folder):
    pytest.importorskip("accelerate")
    model, given = saved("exact terms", folder)
    loaded = load_performer(folder, device_map=device_map)
    assert torch.equal(output(loaded, given), output(model, given))


def test_path_may_be_a_string(folder):
    model, given = saved("features", folder)
    assert torch.equal(output(load_performer(str(folder)), given), output(model, given))


def test_a_folder_that_is_not_there(folder):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_performer(folder)


def test_a_model_that_is_not_converted(folder):
    build("bert").save_pretrained(folder)
    with pytest.raises(ValueError, match="BertForMaskedLM that is not converted"):
        load_performer(folder)


def test_a_folder_without_weights(folder):
    saved("features", folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_performer(folder)


def test_a_missing_tensor(folder):
    saved("features", folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    missing = next(name for name in tensors if ".favor." in name)
    del tensors[missing]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"have no tensor {missing}"):
        load_performer(folder)


def edit(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def test_settings_of_another_version(folder):
    saved("features", folder)
    edit(folder, lambda config: config["performers"].update(temperature=2))
    with pytest.raises(ValueError, match=r"unknown settings of its conversion, \['temperature'\]"):
        load_performer(folder)


def test_a_class_that_transformers_does_not_have(folder):
    saved("features", folder)
    edit(folder, lambda config: config.update(architectures=["BertForMyself"]))
    with pytest.raises(ValueError, match="holds a BertForMyself, and no class of that name"):
        load_performer(folder)


def test_other_numbers_of_features_than_the_record_says(folder):
    saved("features", folder)
    edit(folder, lambda config: config["performers"].update(num_features=32))
    # Some releases of transformers notice it, others leave it to us.
    with pytest.raises((RuntimeError, ValueError), match=r"ignore_mismatched|do not belong"):
        load_performer(folder)


def test_the_configuration_says_how_the_model_was_converted(folder):
    saved("hybrid", folder)
    record = json.loads((folder / "config.json").read_text())["performers"]
    assert record["num_features"] == 16
    assert record["layers"] == [-1]
    assert record["estimator"] == "positive"


def test_vision_language_models(folder):
    text = {"model_type": "llama", "vocab_size": 60, "num_key_value_heads": 2}
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    vision = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, **sizes}
    config = transformers.LlavaConfig(
        text_config={**text, **sizes}, vision_config=vision, image_token_index=59
    )
    model = converted(transformers.LlavaForConditionalGeneration(config).eval(), num_features=16)
    ids = token_ids(1, 20).clamp_max(58)
    ids[:, :16] = 59
    given = {"input_ids": ids, "pixel_values": torch.ones(1, 3, 32, 32)}
    model.save_pretrained(folder)
    # Saved under other names than those of the modules.
    assert torch.equal(output(load_performer(folder), given), output(model, given))


def test_generation_settings_survive(folder):
    model, _ = case("exact terms")
    model.save_pretrained(folder)
    options = {"max_new_tokens": 8, "do_sample": False}
    given = generation_inputs("llama")
    expected = model.generate(**given, **options)
    assert torch.equal(load_performer(folder).generate(**given, **options), expected)


@pytest.mark.exhaustive
def test_trainer_takes_a_loaded_model_and_goes_on_from_its_checkpoints(folder, tmp_path):
    model, _ = saved("exact terms", folder)
    loaded = type(model).from_pretrained(folder)
    rows = token_ids(8, 12)
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(loaded, arguments, train_dataset=data).train()
    assert torch.equal(
        output(type(model).from_pretrained(tmp_path / "run" / "checkpoint-2"), {"input_ids": rows}),
        output(loaded.eval(), {"input_ids": rows}),
    )
    again = type(model).from_pretrained(folder)
    trainer = transformers.Trainer(again, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    for (name, a), (_, b) in zip(
        loaded.state_dict().items(), again.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(a, b, msg=name)
