"""Configurations, presets, names, sweeps and schedules: everything that is decided before anything is read."""

from __future__ import annotations

import pytest
from tcsae.errors import ResourceError, UsageError
from tcsae.train.config import TrainConfig
from tcsae.train.loop.memory_plan import member_bytes, split_passes, step_bytes
from tcsae.train.loop.schedule import learning_rate, warmup_factor
from tcsae.train.loss.objective import objective_of
from tcsae.train.options import train_config
from tcsae.train.plan import as_count, default_width, parse_sweep, plan_members, resolve, tokens_per_step
from tcsae.train.presets import PRESETS, build_config, changed, show_toml


def names(config=None, grid=None, **changes):
    config = config or build_config(None, None, changes)
    return [plan.name for plan in plan_members(config, grid or {}, layer=12, d_model=2304, n_tokens=10_000)]


def test_the_paper_preset_is_the_paper():
    config = build_config("paper")
    sae, loss, temporal, optimiser = config.sae, config.loss, config.temporal, config.optimiser
    assert (sae.activation, sae.initial, sae.decoder, sae.b_dec) == ("relu", "paper", "free", "zero")
    assert (loss.l1, loss.decoder_norms, loss.aux_weight, loss.l1_warmup) == (0.04, False, 0.0, 0.0)
    assert (temporal.form, temporal.weight, temporal.partner, temporal.scope) == ("pairwise", 0.1, "next", 1.0)
    assert (config.data.window, config.data.batch_size, config.data.pool) == (5, 2048, 2048)
    assert (config.data.scale, config.data.norm_filter) == ("none", 0.0)
    assert (optimiser.name, optimiser.lr, optimiser.weight_decay, optimiser.decay_decoder) == (
        "adamw",
        3e-4,
        0.01,
        True,
    )
    assert (optimiser.clip, optimiser.warmup, optimiser.warmup_share, optimiser.decay_share) == (1.0, 1000, 1.0, 0.0)
    assert default_width(sae, 2304) == 2304
    assert learning_rate(499, 2000, optimiser) == pytest.approx(1.5e-4)
    assert learning_rate(1999, 2000, optimiser) == 3e-4


def test_the_modern_preset_is_the_design_cards():
    config = build_config()
    assert config == TrainConfig()
    assert (config.sae.activation, config.sae.k, config.sae.initial, config.sae.decoder) == ("topk", 64, "tied", "unit")
    assert (config.data.scale, config.data.norm_filter, config.optimiser.decay_decoder) == ("rms", 10.0, False)
    assert config.loss.aux_weight > 0
    assert default_width(config.sae, 2304) == 16384
    assert default_width(config.sae, 576) == 4096


def test_who_compares_with_an_earlier_token_sees_pairs_and_so_does_its_twin():
    plans = plan_members(
        build_config(), {"temporal.partner": ["next", "earlier"]}, layer=1, d_model=8, n_tokens=10_000
    )  # fmt: skip
    views = {plan.name.removeprefix("l1-topk64-"): plan.config.data.view for plan in plans}
    windows, pairs = dict.fromkeys(("pairwise0.03-w5-s0", "none-s0"), "windows"), "pairs"
    assert views == windows | dict.fromkeys(("pairwise0.03-earlier-s0", "none-pairs-s0"), pairs)
    assert [tokens_per_step(plan.config) for plan in plans] == [2045, 2045, 2048, 2048]
    assert len({plan.config.run.steps for plan in plans}) == 1


def test_2048_tokens_in_windows_of_5_are_409_windows():
    assert tokens_per_step(build_config()) == 409 * 5
    assert tokens_per_step(build_config(None, None, {"data.siblings": True})) == 408 * 5  # as records of before say it
    assert tokens_per_step(build_config(None, None, {"data.siblings": 8})) == 51 * 8 * 5


@pytest.mark.parametrize("preset", PRESETS)
def test_what_show_config_prints_is_read_back_the_same(tmp_path, preset):
    config = build_config(preset, None, {"sae.width": 512, "run.name": 'a "b"', "run.log": ["jsonl", "wandb"]})
    (tmp_path / "my.toml").write_text(show_toml(config))
    assert build_config(None, tmp_path / "my.toml") == config


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    (tmp_path / "my.toml").write_text('preset = "paper"\n[loss]\nl1 = 0.5\n[optimiser]\nlr = 0.1\n')
    config = build_config(None, tmp_path / "my.toml", {"optimiser.lr": 0.2})
    assert (config.sae.activation, config.loss.l1, config.optimiser.lr) == ("relu", 0.5, 0.2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[sae]\nwidht = 3", r"sae.widht: Extra inputs are not permitted"),
        ("[sae]\nk = 0", r"sae.k: Input should be greater than or equal to 1 \(got 0\)"),
        ("[data]\nwindow = 1", r"a window of 1 has no pairs at distance 1"),
        ('[temporal]\npartner = "lag"\nlag = 5', r"no pairs at distance 5: make data.window at least 6"),
        ('[temporal]\nform = "window_mean"\npartner = "shuffled"', r"'shuffled' does not apply"),
        ('[temporal]\nform = "cosine"\npartner = "l2"', r"form 'cosine' has none"),
        ("[sae]\ngroups = [0.2]", r"rise to 1, such as 0.2,1 \(got \[0.2\]\)"),
        ("[sae]\ngroups = [0.5, 0.2, 1]", r"sae.groups: groups are fractions of the dictionary that rise to 1"),
        ('[sae]\ngroups = "0.2,one"', r"sae.groups.1: Input should be a valid number"),
        ("[sae]\ngroups = [0.2, 1]\ngroup_weights = [1]", r"there are 2 groups and 1 sae.group_weights"),
        ('preset = "old"', r"preset 'old' is unknown"),
        ("sae = 3", r"'sae' is no table"),
        ("sae = ", r"is no TOML"),
        ("a = " + "[" * 100_000, r"is nested too deeply"),
        ("[run]\nseed = " + "9" * 5000, r"is no TOML"),
        ("[run]\nseed = -1", r"run.seed"),
        ("[optimiser]\nlr = nan", r"optimiser.lr: Input should be a finite number"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, text, sentence):
    (tmp_path / "my.toml").write_text(text)
    with pytest.raises(UsageError, match=sentence) as caught:
        build_config(None, tmp_path / "my.toml")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="is missing: name a TOML file"):
        build_config(None, tmp_path / "none.toml")


def test_names_say_what_a_run_is():
    assert names() == [f"l12-topk64-pairwise{TrainConfig().temporal.weight:g}-w5-s0", "l12-topk64-none-s0"]
    assert names(build_config("paper")) == ["l12-relu0.04-pairwise0.1-w5-s0", "l12-relu0.04-none-s0"]
    assert names(**{"temporal.form": "none"}) == ["l12-topk64-none-s0"]
    assert names(**{"run.baseline": False, "temporal.weight": 1, "temporal.partner": "lag", "temporal.lag": 2}) == [
        "l12-topk64-pairwise1-lag2-w5-s0"
    ]
    assert names(**{"run.baseline": False, "temporal.form": "l1", "temporal.weight": 1, "temporal.scope": 0.2}) == [
        "l12-topk64-l11-scope0.2-w5-s0"
    ]
    assert names(**{"run.baseline": False, "sae.groups": "0.2,1"}) == ["l12-topk64-groups0.2-1-pairwise0.03-w5-s0"]
    assert names(grid=parse_sweep(["groups=1,0.2:1"]), **{"temporal.form": "none"}) == [
        "l12-topk64-none-s0", "l12-topk64-groups0.2-1-none-s0",
    ]  # fmt: skip
    jump = {"sae.activation": "jumprelu", "temporal.form": "none", "loss.target_l0": 32}
    assert names(**jump) == ["l12-jumprelu-l0-32-none-s0"]
    assert names(**jump, **{"loss.l0_penalty": "quadratic"}) == ["l12-jumprelu-l0-32-quadratic-none-s0"]
    assert names(**{"run.name": "mine"}) == ["mine", "mine-twin"]
    assert names(**{"run.name": "mine", "temporal.form": "none"}) == ["mine"]


def test_a_sweep_has_every_point_once_and_shares_twins():
    grid = parse_sweep(["temporal-weight=0,0.03,0.1", "seed=0,1", "optimiser.lr=1e-3,1e-4"])
    found = names(grid=grid)
    assert len(found) == len(set(found)) == 3 * 2 * 2
    assert "l12-topk64-none-lr0.001-s0" in found
    assert "l12-topk64-pairwise0.1-w5-lr0.0001-s1" in found
    windows = names(grid=parse_sweep(["window=2,5"]), **{"temporal.weight": 1})
    assert windows == [
        "l12-topk64-pairwise1-w2-s0", "l12-topk64-none-window2-s0", "l12-topk64-pairwise1-w5-s0",
        "l12-topk64-none-window5-s0",
    ]  # fmt: skip
    assert names(grid={"run.seed": ("0", "1")}, **{"run.name": "x", "temporal.form": "none"}) == [
        "x-l12-topk64-none-s0", "x-l12-topk64-none-s1",
    ]  # fmt: skip


def test_twins_know_each_other():
    plans = plan_members(build_config(), {"run.seed": ("0", "1")}, layer=12, d_model=64, n_tokens=10_000)
    by_name = {plan.name: plan for plan in plans}
    for plan in plans:
        assert plan.twin is not None
        assert by_name[plan.twin].role != plan.role
        assert by_name[plan.twin].config.run.seed == plan.config.run.seed
        assert by_name[plan.twin].config.data == plan.config.data


@pytest.mark.parametrize("bad", ["lr", "lr=", "=3", "out=a,b", "steps=1,2", "nonsense=1", "store=a"])
def test_meaningless_sweeps_are_refused(bad):
    with pytest.raises(UsageError):
        parse_sweep([bad])


@pytest.mark.parametrize("bad", ["sae.nonsense=1", "lr=fast", "k=0", "width=-3", "temporal=pairs"])
def test_sweeps_are_checked_like_files(bad):
    with pytest.raises(UsageError):
        names(grid=parse_sweep([bad]))


def test_sizes_that_cannot_be_are_refused_naming_both():
    with pytest.raises(UsageError, match="k is 64, the dictionary has 32"):
        resolve(build_config(None, None, {"sae.width": 32}), d_model=8, n_tokens=100)
    with pytest.raises(UsageError, match="a batch of 4 tokens holds no window of 5"):
        resolve(build_config(None, None, {"data.batch_size": 4}), d_model=64, n_tokens=100)
    with pytest.raises(UsageError, match=r"groups 0.01, 0.02, 1 of 64 features are prefixes of 1, 1, 64: give groups"):
        resolve(build_config(None, None, {"sae.width": 64, "sae.groups": "0.01,0.02,1"}), d_model=64, n_tokens=100)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"loss.target_l0": 32}, r"topk has L0 = k by itself: give --k 32 instead of --target-l0"),
        ({"loss.l0_penalty": "quadratic"}, r"quadratic around loss.target_l0, which is 0: give --target-l0"),
        (
            {"sae.activation": "relu", "loss.l0_penalty": "quadratic", "loss.target_l0": 3},
            r"moves jumprelu's thresholds, activation 'relu' of architecture 'sae' has none: use linear",
        ),
        ({"sae.activation": "relu", "loss.target_l0": 3, "loss.l1": 0}, r"loss.l1 is 0: leave --l1 out"),
        (
            {"temporal.form": "cosine", "temporal.per_feature": "density"},
            r"a sum over features, 'cosine' is none: choose one of pairwise, window_mean, l1, squared_norms",
        ),
        (
            {"temporal.partner": "earlier", "temporal.per_feature": "autocorrelation"},
            r"cannot be measured where pairs are seen, no windows of neighbours: use density",
        ),
    ],
)
def test_what_cannot_be_steered_is_refused(changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        resolve(build_config(None, None, changes), d_model=64, n_tokens=100)


def test_what_cannot_be_steered_may_stand_where_a_sweep_does_not_ask_for_it():
    assert len(names(grid=parse_sweep(["activation=relu,jumprelu"]), **{"loss.target_l0": 32})) == 4


def test_counts_may_be_written_short():
    assert as_count("sae.width", "16k") == 16_000
    assert as_count("run.tokens", "10M") == 10_000_000
    assert as_count("optimiser.lr", "1e-3") == "1e-3"


def test_default_steps_are_the_store_once():
    assert resolve(build_config(), d_model=64, n_tokens=204_800).run.steps == 100
    assert resolve(build_config(None, None, {"run.tokens": 4_096}), d_model=64, n_tokens=204_500).run.steps == 2
    assert resolve(build_config(None, None, {"run.steps": 7}), d_model=64, n_tokens=204_500).run.steps == 7
    assert resolve(build_config(), d_model=64, n_tokens=3).run.steps == 1


def test_the_learning_rate_rises_stays_and_falls():
    config = build_config(None, None, {"optimiser.lr": 1.0}).optimiser
    rates = [learning_rate(step, 1000, config) for step in range(1000)]
    assert rates[:50] == pytest.approx([(i + 1) / 50 for i in range(50)])
    assert set(rates[50:801]) == {1.0}
    assert rates[801:] == pytest.approx([(200 - i) / 200 for i in range(1, 200)])
    assert learning_rate(0, 1_000_000, config) == pytest.approx(1 / 1000)
    assert learning_rate(0, 1, config) == 1.0


def test_weights_warm_up_linearly():
    assert [warmup_factor(step, 100, 0.1) for step in (0, 5, 10, 99)] == [0, 0.5, 1, 1]
    assert warmup_factor(0, 100, 0.0) == 1.0


def test_the_objective_follows_the_activation():
    topk = objective_of(build_config(), 64, 512)
    assert (topk.sparsity_weight, topk.aux_k, topk.temporal.n_features) == (0.0, 32, 512)
    relu = objective_of(build_config(None, None, {"sae.activation": "relu", "temporal.scope": 0.2}), 64, 512)
    assert relu.sparsity_weight > 0
    assert (relu.aux_weight, relu.aux_k, relu.decoder_norms, relu.temporal.n_features) == (0.0, 0, False, 102)
    free = objective_of(build_config(None, None, {"sae.activation": "relu", "sae.decoder": "free"}), 64, 512)
    assert free.decoder_norms
    assert not objective_of(build_config("paper"), 64, 512).decoder_norms
    nested = build_config(None, None, {"sae.groups": "0.2,1", "sae.group_weights": "0.2,0.8"})
    assert objective_of(nested, 64, 512).groups == ((102, 0.1), (512, 0.4))  # mean of weight × error
    assert topk.groups == ()
    assert objective_of(build_config(None, None, {"sae.group_weights": (0.5,)}), 64, 512).groups == ((512, 0.5),)
    warmed = free.warmed(0.5, 0.0)
    assert warmed.sparsity_weight == free.sparsity_weight / 2
    assert not warmed.temporal.active


def test_passes_fit_and_keep_the_order():
    plans = plan_members(build_config(), {"run.seed": ("0", "1", "2")}, layer=1, d_model=64, n_tokens=10_000)
    one = member_bytes(plans[0]) + step_bytes(plans[0])
    passes = split_passes(plans, one + 2 * member_bytes(plans[0]))
    assert [len(part) for part in passes] == [3, 3]
    assert [plan for part in passes for plan in part] == plans
    assert len(split_passes(plans, 1 << 60)) == 1
    with pytest.raises(ResourceError, match=plans[0].name):
        split_passes(plans, one - 1)


def test_changes_are_checked():
    with pytest.raises(UsageError, match=r"data\.window"):
        changed(build_config(), {"data.window": 0})


def test_a_store_has_the_weight_of_its_layer(tmp_path):
    by_option = train_config(temporal_weight="5=0.1, 12=0.03")
    assert by_option.temporal.weight_by_layer == {5: 0.1, 12: 0.03}
    assert train_config(temporal_weight={5: 0.1, 12: 0.03}) == by_option
    (tmp_path / "my.toml").write_text(show_toml(by_option))
    assert build_config(None, tmp_path / "my.toml") == by_option
    (tmp_path / "table.toml").write_text("[temporal.weight_by_layer]\n5 = 0.1\n12 = 0.03\n")
    assert build_config(None, tmp_path / "table.toml") == by_option
    plain = train_config(tmp_path / "my.toml", temporal_weight=0.2)
    assert (plain.temporal.weight, plain.temporal.weight_by_layer) == (0.2, {})
    about = {"d_model": 64, "n_tokens": 100_000}
    for layer, weight in ((5, 0.1), (12, 0.03)):
        tc, twin = plan_members(by_option, {}, layer=layer, **about)
        assert tc.name == f"l{layer}-topk64-pairwise{weight:g}-w5-s0"
        alone = plan_members(train_config(temporal_weight=weight), {}, layer=layer, **about)
        assert [tc, twin] == alone  # whoever trained with one number goes on with the table


@pytest.mark.parametrize(
    ("weights", "grid", "sentence"),
    [
        ("5=0.1,12=0.03", {}, r"λ2 is given by layer \(5 = 0.1, 12 = 0.03\), and the store is of layer 8: give it one"),
        ("8=0.1", {"temporal.weight": ["0", "1"]}, r"λ2 is swept and given by layer \(8 = 0.1\): give one of the two"),
    ],
)
def test_weights_of_layers_that_do_not_fit_are_one_sentence(weights, grid, sentence):
    with pytest.raises(UsageError, match=sentence):
        plan_members(train_config(temporal_weight=weights), grid, layer=8, d_model=64, n_tokens=100_000)


@pytest.mark.parametrize("weights", ["5=0.1,5=0.2", "five=1", "5=high", "5=-1", "-1=0.1", "5=0.1,,", {5: -1}])
def test_what_are_no_weights_of_layers_is_one_sentence(weights):
    with pytest.raises(UsageError) as caught:
        train_config(temporal_weight=weights)
    assert "\n" not in str(caught.value)
