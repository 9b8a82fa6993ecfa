// Colours and sizes of all compositions; nanochat/pictures.py has the same colours.

export const INK = "#e8edf7";
export const SOFT = "#8fa0bf";
export const GROUND = "#0d1424";
export const PANEL = "#151f36";
export const LINE = "#2a3858";
export const BLUE = "#5aa9ff";
export const TEAL = "#4fd1c5";
export const AMBER = "#ffb454";
export const CORAL = "#ff7a70";
export const VIOLET = "#a78bfa";

export const STAGES: Record<string, string> = { base: BLUE, sft: TEAL, rl: AMBER };
export const ROLES: Record<string, string> = { embedding: BLUE, value_embedding: TEAL, matrix: VIOLET, head: AMBER };
export const DEPTHS = [BLUE, TEAL, VIOLET, CORAL, SOFT];

export const WIDTH = 1920;
export const HEIGHT = 1080;
export const FPS = 30;
export const SECONDS = 12; // of every composition

// 1384124976 -> "1.38 B"
export const short = (value: number): string => {
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]] as [number, string][]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${letter}`;
  }
  return `${Number(value.toPrecision(3))}`;
};

// 31000000000000 -> "3.1e13"
export const power = (value: number): string => value.toExponential(1).replace("e+", "e");
