// What the compositions share: the page with its headline, time, scales and axes.

import React from "react";
import { AbsoluteFill, Easing, interpolate, useCurrentFrame, useVideoConfig } from "remotion";
import { GROUND, INK, LINE, PANEL, SOFT } from "./theme";

export const FONT = "Inter, 'Helvetica Neue', 'DejaVu Sans', sans-serif";

// How far a movement has come: 0 before second `from`, 1 after `from + length`.
export const useProgress = () => {
  const frame = useCurrentFrame();
  const { fps } = useVideoConfig();
  return (from: number, length: number): number =>
    interpolate(frame / fps, [from, from + length], [0, 1], {
      extrapolateLeft: "clamp",
      extrapolateRight: "clamp",
      easing: Easing.inOut(Easing.cubic),
    });
};

export const Page: React.FC<{ title: string; below: string; children: React.ReactNode }> = ({ title, below, children }) => {
  const progress = useProgress();
  return (
    <AbsoluteFill style={{ background: `radial-gradient(circle at 30% 0%, #16213c, ${GROUND} 65%)`, fontFamily: FONT, color: INK }}>
      <div style={{ position: "absolute", left: 80, top: 52, opacity: progress(0, 0.8) }}>
        <div style={{ fontSize: 60, fontWeight: 700, letterSpacing: -1 }}>{title}</div>
        <div style={{ fontSize: 28, color: SOFT, marginTop: 6 }}>{below}</div>
      </div>
      {children}
    </AbsoluteFill>
  );
};

export const Missing: React.FC<{ name: string }> = ({ name }) => (
  <Page title={name} below="There is nothing to show yet.">
    <div style={{ position: "absolute", left: 80, top: 260, fontSize: 34, lineHeight: 1.7, color: SOFT }}>
      python -m scripts.visualize_data --model-tag=TAG
      <br />
      npx remotion studio --props=FOLDER/{name}.json
    </div>
  </Page>
);

export type Box = { x: number; y: number; width: number; height: number };
export type Scale = (value: number) => number;

export const linear = (domain: [number, number], range: [number, number]): Scale => (value) =>
  range[0] + ((value - domain[0]) / (domain[1] - domain[0] || 1)) * (range[1] - range[0]);

export const logarithmic = (domain: [number, number], range: [number, number]): Scale => {
  const scale = linear([Math.log10(domain[0]), Math.log10(domain[1])], range);
  return (value) => scale(Math.log10(value));
};

export const line = (x: number[], y: number[], sx: Scale, sy: Scale, share = 1): string =>
  x
    .slice(0, Math.max(1, Math.ceil(share * x.length)))
    .map((value, i) => `${i ? "L" : "M"}${sx(value).toFixed(1)} ${sy(y[i]).toFixed(1)}`)
    .join("");

// Round numbers in a range, about `count` of them.
export const ticks = ([low, high]: [number, number], count = 5): number[] => {
  const rough = (high - low || 1) / count;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * ([1, 2, 5, 10].find((m) => m * unit >= rough) ?? 10);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
};

// Powers of ten in a range; with their doubles and fives where there are fewer than three.
export const decades = ([low, high]: [number, number]): number[] => {
  const from = Math.floor(Math.log10(low));
  const powers = Array.from({ length: Math.ceil(Math.log10(high)) - from + 1 }, (_, i) => 10 ** (from + i));
  const inside = (values: number[]) => values.filter((value) => value >= low && value <= high);
  const found = inside(powers);
  return found.length > 2 ? found : inside(powers.flatMap((value) => [value, 2 * value, 5 * value]));
};

export const Axes: React.FC<{
  box: Box;
  sx: Scale;
  sy: Scale;
  x: number[];
  y: number[];
  showX: (value: number) => string;
  showY: (value: number) => string;
  labelX?: string;
  labelY?: string;
}> = ({ box, sx, sy, x, y, showX, showY, labelX, labelY }) => (
  <g fontFamily={FONT} fill={SOFT} fontSize={22}>
    <rect {...box} fill={PANEL} rx={14} />
    {y.map((value) => (
      <g key={value}>
        <line x1={box.x} x2={box.x + box.width} y1={sy(value)} y2={sy(value)} stroke={LINE} />
        <text x={box.x - 14} y={sy(value) + 8} textAnchor="end">{showY(value)}</text>
      </g>
    ))}
    {x.map((value) => (
      <g key={value}>
        <line x1={sx(value)} x2={sx(value)} y1={box.y} y2={box.y + box.height} stroke={LINE} />
        <text x={sx(value)} y={box.y + box.height + 32} textAnchor="middle">{showX(value)}</text>
      </g>
    ))}
    {labelX ? <text x={box.x + box.width / 2} y={box.y + box.height + 72} textAnchor="middle">{labelX}</text> : null}
    {labelY ? <text x={box.x} y={box.y - 18}>{labelY}</text> : null}
  </g>
);
