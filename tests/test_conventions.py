"""The conventions of reinforcement learning from human feedback, each with the tests that prove it here.

The numbers are those of the checklist that this project keeps: the details in which implementations of RLHF are known
to differ or to go wrong. Tests prove a detail, named as pytest names them, or a sentence says why it cannot arise.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

from jaxgpt import advantages, losses
from jaxgpt.config import schema

TESTS = Path(__file__).parent


class Detail(NamedTuple):
    """A number, or a word for those without one; what must hold; the tests that prove it, or why none is needed."""

    number: int | str
    statement: str
    proof: tuple[str, ...] | str


CHAT, TALKS, RANKINGS = "data/test_chat.py", "data/test_conversations.py", "data/test_rankings.py"
MODEL, SAMPLING, OPTIM = "models/test_transformer.py", "test_sampling.py", "test_optim.py"
REWARD, ROLLOUTS, PPO = "stages/test_reward.py", "stages/test_rollouts.py", "stages/test_ppo.py"
FORKS, GROUPS, RATINGS = "stages/test_ppo_forks.py", "stages/test_groups.py", "evaluate/test_ratings.py"
POLICY, PAIRS, DPO = (f"losses/test_losses_{name}.py" for name in ("policy", "rankings", "preference"))
KL, SHAPING, GAE = (f"advantages/test_advantages_{name}.py" for name in ("kl", "rewards", "estimates"))

DETAILS = (
    # --- tokens, templates, masks -----------------------------------------------------------------------------------
    Detail(
        1,
        "A conversation becomes ids once, by the template alone, and has one BOS however it came in.",
        (
            f"{CHAT}::test_any_conversation_trains_what_the_assistant_says_and_its_end",
            f"{CHAT}::test_there_is_a_bos_where_the_template_writes_one_and_never_two",
            f"{CHAT}::test_rendered_text_given_again_is_plain_text",
        ),
    ),
    Detail(
        2,
        "What is trained is known by spans and lengths, so that an end token that also pads is trained.",
        (f"{TALKS}::test_the_end_is_trained_where_it_is_the_padding_too",),
    ),
    Detail(
        3,
        "The assistant's words and the end of its turn are trained, role headers and other turns are not.",
        (
            f"{TALKS}::test_trained_tokens_are_the_assistants_words_and_their_end",
            "stages/test_sft.py::test_only_what_the_assistant_says_counts",
        ),
    ),
    Detail(
        4,
        "A conversation from which nothing can be learned is an error that names its line.",
        (f"{TALKS}::test_a_bad_record_is_named_by_file_and_line",),
    ),
    Detail(
        5,
        "Too long conversations keep their beginning, and how many were cut is counted.",
        (f"{TALKS}::test_too_long_conversations_lose_their_end",),
    ),
    Detail(
        6,
        "Targets are shifted once: a bigram table costs exactly its cross-entropy.",
        (
            "losses/test_losses_language.py::test_next_token_of_a_bigram_table_is_its_cross_entropy",
            "data/test_tokens.py::test_every_token_is_a_target_once",
        ),
    ),
    Detail(
        7,
        "Means are over the tokens of the global batch: accumulation and devices change nothing.",
        (
            "train/test_step.py::test_cuts_and_meshes_agree",
            "train/test_step.py::test_a_batch_counts_by_its_weights_however_it_is_cut",
            "losses/test_losses_ratio.py::test_an_aggregation_does_not_depend_on_how_the_batch_is_cut",
            "losses/test_losses_sharded.py::test_sharded_equals_one_device",
        ),
    ),
    Detail(
        8,
        "Packed conversations are read as if each stood alone, and no gradient crosses between them.",
        (
            f"{MODEL}::test_packed_equals_unpacked",
            f"{MODEL}::test_no_gradient_flows_between_packed_documents",
        ),
    ),
    Detail(
        9,
        "Positions begin anew in each packed conversation, for learned positions as for rotated ones.",
        (f"{MODEL}::test_packed_equals_unpacked", f"{TALKS}::test_packed_rows_hold_every_example_exactly_once"),
    ),
    Detail(
        10,
        "The first token of a packed conversation is no target of the one before it.",
        (f"{TALKS}::test_packed_rows_hold_every_example_exactly_once",),
    ),
    Detail(
        11,
        "Rows are filled longest first, each example into the fullest row with room.",
        (f"{TALKS}::test_best_fit_takes_the_fullest_row_with_room",),
    ),
    Detail(
        12,
        "Padding on the left changes no result.",
        (
            f"{MODEL}::test_left_padded_equals_unpadded",
            f"{SAMPLING}::test_ragged_cached_decoding_is_the_full_forward_pass_at_any_temperature",
        ),
    ),
    Detail(
        13,
        "Decoding with a cache is the full forward pass, for rows of unequal length too.",
        (
            "models/test_decode.py::test_cached_decoding_equals_the_full_forward_pass",
            f"{SAMPLING}::test_ragged_cached_decoding_is_the_full_forward_pass_at_any_temperature",
        ),
    ),
    Detail(
        14,
        "Dropout is for fine-tuning alone: reward models, policies and all evaluations have none.",
        (
            "test_conventions.py::test_fine_tuning_alone_has_dropout",
            "models/test_layers.py::test_without_seeds_or_without_rate_the_program_has_no_dropout",
            "stages/test_sft.py::test_dropout_is_drawn_for_each_step_and_row_and_not_for_each_part",
        ),
    ),
    # --- sampler ----------------------------------------------------------------------------------------------------
    Detail(
        15,
        "The temperature divides the logits in sampler, policy and reference alike, so the first ratio is 1 at 0.7.",
        (
            f"{SAMPLING}::test_tokens_follow_the_softmax_at_the_temperature_and_filters_come_behind_it",
            "stages/test_first_update.py::test_no_ratio_of_the_first_minibatch_is_far_from_one",
            f"{ROLLOUTS}::test_kl_is_summed_over_the_response_at_the_sampling_temperature",
            f"{SAMPLING}::test_ragged_cached_decoding_is_the_full_forward_pass_at_any_temperature",
        ),
    ),
    Detail(
        16,
        "Top-k keeps ties; top-p keeps the token that crosses it.",
        (f"{SAMPLING}::test_top_k_keeps_ties_and_top_p_the_token_that_crosses_it",),
    ),
    Detail(
        17,
        "Filters hold for the first sampled token as for all others.",
        (
            f"{SAMPLING}::test_the_narrowest_filters_give_the_argmax_from_the_first_token_on",
            f"{SAMPLING}::test_tokens_follow_the_softmax_at_the_temperature_and_filters_come_behind_it",
        ),
    ),
    Detail(
        18,
        "Draws follow the softmax: chi-square of 100,000 of them.",
        (
            f"{SAMPLING}::test_draws_follow_the_softmax",
            f"{SAMPLING}::test_tokens_follow_the_softmax_at_the_temperature_and_filters_come_behind_it",
        ),
    ),
    Detail(
        19,
        "The sampler's log-probabilities are those that scoring and training compute.",
        (
            f"{SAMPLING}::test_ragged_cached_decoding_is_the_full_forward_pass_at_any_temperature",
            "test_api.py::test_sampling_logprobs_are_scoring_logprobs",
        ),
    ),
    Detail(
        20,
        "Responses are cut at the first stop token at or after a place, and nothing behind it is looked at.",
        (
            f"{SHAPING}::test_truncation_keeps_the_first_stop_token_at_or_after_a_place_and_nothing_behind",
            f"{SHAPING}::test_what_follows_the_stop_changes_no_truncation",
            f"{SAMPLING}::test_an_end_counts_from_a_place_on",
            f"{FORKS}::test_an_end_counts_from_a_token_on",
            f"{ROLLOUTS}::test_what_stands_behind_the_end_changes_nothing",
        ),
    ),
    # --- reward model -----------------------------------------------------------------------------------------------
    Detail(
        21,
        "A score is read at the last real token, known by length: padding changes nothing.",
        (
            f"{REWARD}::test_a_score_does_not_depend_on_padding_or_company",
            "models/test_heads.py::test_padding_behind_a_text_changes_no_score_before_it",
            "test_api.py::test_scores_are_read_at_the_last_token_alone_or_together",
        ),
    ),
    Detail(
        22,
        "A score does not depend on what else is in the batch, nor on the order.",
        (
            f"{REWARD}::test_a_score_does_not_depend_on_padding_or_company",
            "test_api.py::test_scores_are_read_at_the_last_token_alone_or_together",
        ),
    ),
    Detail(
        23,
        "The ranking loss is InstructGPT's: all pairs of a prompt, each response read once.",
        (f"{PAIRS}::test_ranking_is_a_loop_over_pairs", f"{PAIRS}::test_losses_of_rankings_are_loops"),
    ),
    Detail(
        24,
        "For two responses it is the pairwise loss; order and a common offset do not matter.",
        (
            f"{PAIRS}::test_ranking_of_two_is_pairwise_and_swapped_columns_flip_the_accuracy",
            f"{PAIRS}::test_order_and_offset_change_no_loss_and_its_gradient_sums_to_zero",
            f"{REWARD}::test_the_order_of_responses_does_not_matter",
        ),
    ),
    Detail(
        25,
        "All responses of a prompt are in one row, and a prompt on both sides of the split is refused.",
        (
            f"{RANKINGS}::test_a_row_holds_each_response_as_a_conversation",
            f"{RANKINGS}::test_a_prompt_on_both_sides_of_the_split_is_refused",
            f"{RANKINGS}::test_all_rankings_of_a_prompt_are_held_out_or_none",
            f"{REWARD}::test_prompts_on_both_sides_are_refused",
        ),
    ),
    Detail(
        26,
        "Ties make no pair, or half a win each, and a prompt weighs the same however many responses it has.",
        (
            f"{PAIRS}::test_tied_ranks_make_no_pair_and_tied_scores_count_half",
            f"{PAIRS}::test_ranking_is_a_loop_over_pairs",
            f"{PAIRS}::test_a_prompt_weighs_the_same_with_nine_responses_as_with_four",
        ),
    ),
    Detail(
        27,
        "The reward model is the SFT model's trunk and a new head of std 1/sqrt(d + 1); its loss begins at log 2.",
        (
            f"{REWARD}::test_the_backbone_is_the_parents_and_the_head_is_new",
            f"{REWARD}::test_the_loss_begins_at_that_of_a_coin_and_falls",
        ),
    ),
    Detail(
        28,
        "An epoch, the default, visits each comparison once, and the rate falls over just that.",
        (
            f"{REWARD}::test_each_ranking_is_visited_once_an_epoch_and_the_rate_falls_over_just_that",
            "data/test_mixture.py::test_a_number_of_epochs_has_each_row_once_in_each",
        ),
    ),
    Detail(
        29,
        "Gain and bias bring the scores to mean 0 and deviation 1, keep their order and are kept with the model.",
        (
            f"{REWARD}::test_training_responses_score_mean_0_and_deviation_1",
            f"{REWARD}::test_samples_of_the_policy_score_mean_0_and_deviation_1",
            f"{REWARD}::test_a_reloaded_model_keeps_gain_and_offset",
        ),
    ),
    Detail(
        30,
        "A bias brings the demonstrations' scores to mean 0.",
        (f"{REWARD}::test_demonstrations_score_mean_0_and_the_scale_stays",),
    ),
    Detail(
        31,
        "The model never sees which response was preferred: swapped labels give one minus the accuracy.",
        (
            f"{REWARD}::test_swapping_chosen_and_rejected_flips_the_accuracy",
            f"{PAIRS}::test_ranking_of_two_is_pairwise_and_swapped_columns_flip_the_accuracy",
            "evaluate/test_calibration.py::test_which_response_is_named_first_does_not_count",
        ),
    ),
    Detail(
        32,
        "The new head is a function of the seed.",
        (f"{REWARD}::test_two_runs_of_a_seed_are_equal_and_of_two_seeds_are_not",),
    ),
    Detail(
        33,
        "Accuracy and margin are over all pairs; predicted and observed shares agree where the data are Bradley-Terry.",
        (
            "evaluate/test_calibration.py::test_true_probabilities_are_calibrated",
            f"{PAIRS}::test_accuracy_and_margin_are_means_over_all_pairs_of_different_rank",
        ),
    ),
    # --- rollout to rewards -----------------------------------------------------------------------------------------
    Detail(
        34,
        "At the first step the KL from the reference is exactly 0, by every estimator.",
        (
            f"{PPO}::test_the_first_update_is_of_the_policy_that_made_the_episodes",
            f"{KL}::test_kl_of_equal_log_probabilities_is_exactly_zero",
        ),
    ),
    Detail(
        35,
        "The value of a token is read one position before it: true values give no advantage.",
        (
            f"{GAE}::test_true_values_of_a_deterministic_episode_give_zero_advantage",
            f"{ROLLOUTS}::test_advantages_and_returns_are_those_of_a_loop_over_the_tokens",
        ),
    ),
    Detail(
        36,
        "The score stands on the last real token, or behind it as in TRL.",
        (
            f"{SHAPING}::test_the_score_stands_on_the_last_real_token_alone",
            f"{SHAPING}::test_by_default_the_score_stands_on_the_last_token_and_the_kl_is_k1",
            f"{SHAPING}::test_a_score_behind_the_last_token_has_a_place_of_its_own_where_there_is_room",
            f"{ROLLOUTS}::test_the_score_is_that_of_the_unpadded_text_at_its_last_token",
        ),
    ),
    Detail(
        37,
        "Rewards are floats whatever the scores are.",
        (
            f"{SHAPING}::test_rewards_are_float_whatever_the_scores_are",
            f"{SHAPING}::test_the_score_stands_on_the_last_real_token_alone",
        ),
    ),
    Detail(
        38,
        "A response that never ends scores -1, or what the fork says, before the KL is added.",
        (
            f"{SHAPING}::test_missing_end_is_replaced_before_the_penalty",
            f"{SHAPING}::test_the_score_of_a_response_without_an_end",
            f"{GROUPS}::test_the_rule_for_missing_ends_and_the_clip_come_before_what_is_learned",
            f"{ROLLOUTS}::test_the_score_is_that_of_the_unpadded_text_at_its_last_token",
        ),
    ),
    Detail(
        39,
        "The KL is over the tokens up to the end token and with it.",
        (
            f"{SHAPING}::test_garbage_after_the_end_changes_no_reward",
            f"{KL}::test_episode_kl_sums_or_averages_over_tokens_and_ignores_the_rest",
            f"{ROLLOUTS}::test_a_response_is_what_was_sampled_up_to_its_end_and_with_it",
            f"{ROLLOUTS}::test_what_stands_behind_the_end_changes_nothing",
        ),
    ),
    Detail(
        40,
        "k1 and k3 are unbiased estimates of the KL, k2 is not.",
        (
            f"{KL}::test_kl_estimators_of_formula_11",
            f"{KL}::test_k1_and_k3_are_unbiased_and_k2_is_not",
            f"{POLICY}::test_kl_penalty_is_a_loop_over_tokens",
            f"{POLICY}::test_the_expected_gradient_of_each_estimator_is_what_its_docstring_says",
        ),
    ),
    Detail(
        41,
        "The KL coefficient rests at its target, counts episodes, and moves once a rollout.",
        (
            f"{KL}::test_adaptive_kl_at_its_target_changes_nothing_and_counts_episodes",
            f"{KL}::test_adaptive_kl_over_rollouts_is_the_loop_of_ziegler_et_al",
            f"{ROLLOUTS}::test_the_coefficient_moves_where_it_is_adaptive_and_stays_where_it_is_not",
        ),
    ),
    Detail(
        42,
        "objective/kl is the mean over episodes of the sum over tokens.",
        (
            f"{KL}::test_episode_kl_is_the_sum_of_k1_by_default",
            f"{ROLLOUTS}::test_kl_is_summed_over_the_response_at_the_sampling_temperature",
        ),
    ),
    Detail(43, "Whitened rewards keep their mean.", (f"{GAE}::test_whitened_rewards_keep_their_mean",)),
    Detail(
        44,
        "Nothing follows a truncated episode: its value after the last token is 0.",
        (
            f"{GAE}::test_nothing_follows_the_last_token_of_a_truncated_episode",
            f"{ROLLOUTS}::test_advantages_and_returns_are_those_of_a_loop_over_the_tokens",
        ),
    ),
    # --- advantages and losses --------------------------------------------------------------------------------------
    Detail(
        45,
        "Advantages are the discounted sum of what the value did not foresee.",
        (f"{GAE}::test_gae", f"{GAE}::test_gae_with_lambda_one_is_future_reward_less_value_and_with_zero_is_delta"),
    ),
    Detail(
        46,
        "What masked positions hold changes no advantage and no loss.",
        (
            f"{GAE}::test_masked_positions_do_not_enter_gae",
            f"{POLICY}::test_masked_positions_may_hold_anything",
            f"{PAIRS}::test_missing_responses_may_hold_anything",
        ),
    ),
    Detail(
        47,
        "Returns are taken before whitening, and no gradient flows through what the rollout gave.",
        (
            f"{GAE}::test_no_gradient_flows_through_rewards_advantages_and_returns",
            f"{GAE}::test_no_gradient_flows_through_a_group",
            f"{POLICY}::test_no_gradient_through_what_the_rollout_gave",
            f"{ROLLOUTS}::test_advantages_and_returns_are_those_of_a_loop_over_the_tokens",
        ),
    ),
    Detail(
        48,
        "Whitening is over the masked tokens of the global batch, with the biased variance unless asked otherwise.",
        (
            f"{GAE}::test_whiten_is_a_loop_over_the_masked_tokens",
            f"{GAE}::test_the_variance_is_the_biased_one_by_default",
            f"{ROLLOUTS}::test_advantages_and_returns_are_those_of_a_loop_over_the_tokens",
            "advantages/test_advantages_sharded.py::test_sharded_equals_one_device",
        ),
    ),
    Detail(
        49,
        "Clipping stops gains alone: a ratio too high still falls where the advantage is negative.",
        (
            f"{POLICY}::test_clipping_stops_only_gains",
            f"{POLICY}::test_the_upper_range_alone_is_raised",
            f"{POLICY}::test_ppo_policy_is_a_loop_over_tokens",
        ),
    ),
    Detail(
        50,
        "How the tokens' losses become one has a name.",
        (
            "losses/test_losses_ratio.py::test_each_aggregation_is_a_loop_over_its_tokens",
            "losses/test_losses_ratio.py::test_aggregations_of_one_long_and_one_short_response",
        ),
    ),
    Detail(
        51,
        "The value loss is half the larger of the plain and the clipped square.",
        (
            f"{POLICY}::test_value_clip_takes_the_larger_error_and_half_of_it",
            f"{POLICY}::test_ppo_value_is_a_loop_over_tokens",
        ),
    ),
    Detail(
        52,
        "In the first minibatch after a rollout every ratio is 1 and nothing is clipped.",
        (
            "stages/test_first_update.py::test_no_ratio_of_the_first_minibatch_is_far_from_one",
            f"{PPO}::test_the_first_update_is_of_the_policy_that_made_the_episodes",
            f"{POLICY}::test_first_minibatch_has_ratio_one_and_the_policy_gradient",
        ),
    ),
    Detail(53, "policy/approxkl_avg is k2.", (f"{POLICY}::test_ppo_policy_is_a_loop_over_tokens",)),
    Detail(
        54,
        "Each epoch over a rollout has an order of its own and uses every episode once.",
        (f"{ROLLOUTS}::test_every_episode_is_used_once_in_every_epoch",),
    ),
    Detail(
        55,
        "Adam's epsilon stands where the setting says: the first steps of the two forms differ 3.8 times.",
        (
            f"{OPTIM}::test_adams_eps_stands_where_its_form_says",
            f"{OPTIM}::test_the_first_step_of_tensorflows_form_is_3_8_times_smaller_at_small_gradients",
        ),
    ),
    Detail(
        56,
        "The learning rate falls by rollouts, not by minibatches.",
        (
            f"{OPTIM}::test_the_rate_falls_per_rollout_and_not_per_minibatch",
            f"{PPO}::test_the_learning_rate_falls_by_rollouts",
        ),
    ),
    Detail(
        57,
        "The gradient of PPO-ptx is PPO's plus gamma times that of pretraining rows, which are a function of the step.",
        (
            f"{FORKS}::test_the_gradient_of_ppo_ptx_is_that_of_ppo_and_27_8_times_that_of_the_text",
            f"{FORKS}::test_the_update_of_ppo_ptx_does_not_depend_on_how_it_is_cut",
        ),
    ),
    Detail(
        58,
        "A run cut anywhere goes on bit for bit.",
        (
            f"{PPO}::test_a_run_cut_inside_a_rollout_goes_on_bit_for_bit",
            f"{FORKS}::test_all_that_ppo_remembers_comes_back_after_a_cut",
            "train/test_loop.py::test_a_run_cut_at_any_step_goes_on_bit_for_bit",
            "test_resume.py::test_four_kills_leave_no_trace",
        ),
    ),
    # --- without a number -------------------------------------------------------------------------------------------
    Detail(
        "dpo",
        "DPO begins at exactly log 2.",
        (
            f"{DPO}::test_dpo_of_the_reference_itself_is_log_two_and_ipo_its_squared_margin",
            f"{DPO}::test_dpo_is_a_loop_over_pairs",
        ),
    ),
    Detail(
        "grpo",
        "A group whose scores are equal has advantages of 0 and no NaN.",
        (
            f"{GAE}::test_a_group_without_spread_has_no_advantage",
            f"{GAE}::test_group_relative_is_a_loop_over_groups",
        ),
    ),
    Detail(
        "rloo",
        "Leave-one-out advantages sum to 0 in each group.",
        (
            f"{GAE}::test_leave_one_out_is_a_loop_over_the_others_and_sums_to_zero",
            f"{GROUPS}::test_rloo_takes_the_kl_into_the_reward_and_the_others_as_baseline",
        ),
    ),
    Detail(
        "bradley-terry",
        "Ratings of the published example of the Bradley-Terry model are its own.",
        (
            f"{RATINGS}::test_bradley_terry_of_the_published_example",
            f"{RATINGS}::test_at_the_ratings_every_model_wins_as_often_as_it_should",
        ),
    ),
    Detail(
        "best-of-n",
        "Best of n is log n - (n - 1)/n nats from the policy.",
        ("evaluate/test_formulas.py::test_the_distance_of_best_of_n",),
    ),
    Detail(
        "pass@k",
        "pass@k is the unbiased estimate of its paper.",
        (
            f"{RATINGS}::test_pass_at_k_of_small_counts",
            f"{RATINGS}::test_pass_at_k_is_the_share_of_subsets_with_a_right_one",
        ),
    ),
)


def test_every_detail_is_here_once():
    numbers = [detail.number for detail in DETAILS if isinstance(detail.number, int)]
    assert numbers == list(range(1, 59))
    assert len({detail.number for detail in DETAILS}) == len(DETAILS)


def test_every_detail_has_a_proof_or_a_reason():
    assert [detail.number for detail in DETAILS if not detail.proof] == []


def test_every_proof_is_a_test_that_exists():
    names = {name for detail in DETAILS if isinstance(detail.proof, tuple) for name in detail.proof}
    missing = []
    for file in sorted({name.partition("::")[0] for name in names}):
        tree = ast.parse((TESTS / file).read_text())
        found = {f"{file}::{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef)}
        missing += sorted(name for name in names if name.startswith(f"{file}::") and name not in found)
    assert missing == []


def test_settings_name_the_forks_as_the_functions_do():
    pairs = {
        (schema.KlConfig.model_fields["estimator"].annotation, advantages.KlKind),
        (schema.MissingEosConfig.model_fields["how"].annotation, advantages.MissingEos),
        (schema.PpoConfig.model_fields["score_at"].annotation, advantages.Place),
        (schema.DpoConfig.model_fields["loss"].annotation, losses.DpoKind),
        (schema.PpoConfig.model_fields["aggregation"].annotation, losses.Aggregation),
        (schema.RewardConfig.model_fields["ties"].annotation, losses.Ties),
        (schema.RewardConfig.model_fields["weighting"].annotation, losses.Weighting),
        (schema.PpoConfig.model_fields["whiten_variance"].annotation, get_type_hints(advantages.whiten)["variance"]),
        (schema.KlConfig.model_fields["measure"].annotation, get_type_hints(advantages.episode_kl)["how"]),
        (schema.GrpoConfig.model_fields["std"].annotation, get_type_hints(advantages.group_relative)["std"]),
    }
    assert [(setting, fork) for setting, fork in pairs if get_args(setting) != get_args(fork)] == []


def test_fine_tuning_alone_has_dropout():
    sections = {name: field.annotation for name, field in schema.Config.model_fields.items()}
    assert [name for name, kind in sections.items() if "dropout" in fields_of(kind)] == ["sft"]


def fields_of(kind: object) -> list[str]:
    """Names of a section's settings; the section may be optional."""
    kinds = getattr(kind, "__args__", (kind,))
    return [name for one in kinds for name in getattr(one, "model_fields", {})]
