"""LoRA: what an adapter does to a model, merging it, and the proof that the merged model is the same.

  config          target modules, what an adapter's config says, and the change of one weight, a block of rows at a
                  time
  updates         what each tensor of a LoRA adapter does to which weight of the base model
  base_record     what an adapter's folder says about the base it was trained on, and whether a base is that one
  adapter_folder  an adapter's folder, read against the base it is used on, and opened by PEFT whatever PEFT wrote it
  chat_vector     what tuning changed in a model, to be added to another one
  merged_model    a base model with adapters added, read tensor by tensor in bounded memory
  inputs          a base, its adapters and its tokenizer found, checked against each other, and opened as one model
  writer          which files a merged model becomes, writing them from the stream, and what went into them
  manifest        SHA-256 of every file that went in and came out, and the check of a folder by it
  streamed_model  transformers' own model in float32, whose weights are read from files as it needs them
  verify          a merged folder against its base with the adapters beside it, as training ran them

Others import: config, updates, base_record, adapter_folder, merged_model, inputs, writer, manifest, streamed_model,
verify.
"""
