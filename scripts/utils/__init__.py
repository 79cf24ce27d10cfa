"""The small package shared by the scripts.

Layers, a module imports only from its right (tests/test_repo.py checks it):

serving > serving_arguments > serving_http > serving_queue > serving_replies > openai_responses > serving_requests >
grammar > openai_protocol > tool_calls > choice_runs > choice_results > choice_benchmarks > choice_prompts >
choice_answers > choice_presets > choice_questions > choice_subjects > choice_targets > arena_page > arena_results >
judging > players > endpoints > matches > battles > ratings > web_page > web_access > web_base > web_files > web_chat >
web_style > web_texts > engines > drafts > perplexity_models > llamacpp_engine > gguf_tokenizer > vllm_engine >
vllm_options > choice_scoring > transformers_engine > speculative > perplexity > perplexity_pictures > parts >
longbench_results > longbench_metrics > longbench_prompts > longbench_samples > longbench_tasks > report >
answers_report > rlhf_report > recipe > stages > quantization_report > evaluation_report > evaluation_tables >
evaluation_columns > evaluation_results > pages > charts > alignment > ppo_trainer >
rollout_trainer > decoding > slots > rewards > rollouts > reward_trainer > dpo_trainer > reference > pair_trainer >
trainer > runs > training > predictions > inference > export > ollama > verification > comparison > merge_writer >
manifest > merge_inputs > formats > windows > rope > quantization > generation > sampling > data > pairs >
preferences > preference_files > preference_records > samples > documents > token_cache > parallel > actor_critic >
reward_model > modeling > sharding > losses > rl > llamacpp > gguf_files > gguf_metadata > gguf_vocabulary > merging >
meta_files > meta > base_record > shards > checkpoints > streams > adapters > prompts > efficiency > vocabulary >
tokenization > pieces > contamination > ngrams > corpus > lora > arguments > old_flags > files > json_stream
"""
