"""Weights: names and files of models, read and written tensor by tensor, in the safetensors, bin and Meta layouts.

  names              how files and tensors of models and adapters are called
  config             a model folder, found by path or hub id, and its config.json
  generation_config  which tokens end a model's answers and how they are drawn, by its own files
  layers             which layers of a model another depth keeps or repeats, and what its config then says
  reader             safetensors and .bin weights read tensor by tensor, in bounded memory
  model_folder       a model folder read once and strictly: what it lacks and has too much, and how transformers
                     loads it
  writer             which safetensors files a model's tensors go into, and writing them from a stream
  meta_reader        folders of consolidated.NN.pth and params.json, read as Hugging Face models
  meta_writer        a Llama model streamed into consolidated.NN.pth and params.json, hashed on the way
  model_card         the README.md that lies beside weights
  streams            files read ahead and written behind in threads, hashed on the way, without filling the page
                     cache

Others import: names, config, generation_config, layers, reader, model_folder, writer, meta_reader, meta_writer,
model_card, streams.
"""
