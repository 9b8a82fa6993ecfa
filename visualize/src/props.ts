// What each composition is given: the JSON files that `python -m scripts.visualize_data` writes. tests/test_visualize.py
// compares these types with what it writes, so neither can change alone.

export type ModelConfig = {
  sequence_len: number;
  vocab_size: number;
  n_layer: number;
  n_head: number;
  n_kv_head: number;
  n_embd: number;
  window_pattern: string;
  head_dim: number;
};

export type Layer = {
  window: number;
  value_embedding: boolean;
  resid: number;
  x0: number;
};

export type TransformerArchitectureProps = {
  tag: string;
  config: ModelConfig;
  layers: Layer[];
  smear: number;
  backout: number;
  parameters: Record<string, number>;
  flops_per_token: number;
  kv_bytes_per_token: number;
};

export type Curve = {
  x: number[];
  y: number[];
};

export type Stage = {
  stage: string;
  unit: string;
  raw: Curve;
  smooth: Curve;
  lr: Curve;
  val_bpb: Curve;
  minutes: number;
  chance: number | null;
  final: number | null;
};

export type TrainingLossProps = {
  tag: string;
  stages: Stage[];
};

export type Head = {
  head: number;
  weights: number[][];
};

export type AttentionLayer = {
  layer: number;
  window: number;
  heads: Head[];
};

export type AttentionVisualizationProps = {
  tag: string;
  tokens: string[];
  layers: AttentionLayer[];
};

export type Run = {
  tag: string;
  depth: number;
  parameters: number;
  tokens: number;
  flops: number;
  bpb: number;
};

export type Law = {
  a: number;
  b: number;
  residuals: number[];
};

export type Planned = {
  depth: number;
  parameters: number;
  tokens: number;
  batch: number;
  flops: number;
};

export type ScalingLawsProps = {
  runs: Run[];
  best: string[];
  law: Law | null;
  plan: Planned[];
  vocab_size: number;
};
