// Every stage's curve is drawn as it was trained: loss or reward above, learning rate below.

import React from "react";
import { Axes, Box, Missing, Page, line, linear, ticks, useProgress } from "./parts";
import type { Stage, TrainingLossProps } from "./props";
import { CORAL, HEIGHT, INK, SOFT, STAGES, VIOLET, WIDTH } from "./theme";

const DRAWING = 9; // seconds in which all curves are drawn

const Panel: React.FC<{ stage: Stage; box: Box; share: number }> = ({ stage, box, share }) => {
  const color = STAGES[stage.stage] ?? VIOLET;
  const last = Math.max(...stage.raw.x, ...stage.val_bpb.x); // an evaluation after the last step stands one behind it
  const known = [...stage.raw.y, ...(stage.chance ? [stage.chance] : [])];
  const isLoss = stage.smooth.x.length > 0;
  const domain: [number, number] = isLoss ? [0, Math.max(...known) * 1.06] : [Math.min(...known) - 0.5 * (1 - Math.min(...known)), 1];
  const sx = linear([0, last], [box.x, box.x + box.width]);
  const sy = linear(domain, [box.y + box.height, box.y]);
  const low: Box = { ...box, y: box.y + box.height + 78, height: 130 };
  const rate = linear([0, 1.1], [low.y + low.height, low.y]);
  const top = box.y + box.height * (isLoss ? 0.3 : 0.84); // where the curve leaves room for the figure
  const main = isLoss ? stage.smooth : stage.raw;
  const at = Math.max(0, Math.ceil(share * main.x.length) - 1);
  const bits: [number, number] = [0, Math.max(...stage.val_bpb.y, 0.001) * 1.06];
  const bpb = linear(bits, [box.y + box.height, box.y]);
  return (
    <g>
      <Axes box={box} sx={sx} sy={sy} x={ticks([0, last], 4)} y={ticks(domain, 6)} showX={String} showY={(v) => `${Number(v.toFixed(2))}`} labelY={`${stage.stage}: ${stage.unit}`} />
      {stage.chance ? (
        <g>
          <line x1={box.x} x2={box.x + box.width} y1={sy(stage.chance)} y2={sy(stage.chance)} stroke={SOFT} strokeDasharray="4 8" strokeWidth={2} />
          <text x={box.x + box.width - 12} y={sy(stage.chance) - 10} textAnchor="end" fontSize={21} fill={SOFT}>ln V: knows nothing</text>
        </g>
      ) : null}
      <path d={line(stage.raw.x, stage.raw.y, sx, sy, share)} fill="none" stroke={color} strokeWidth={isLoss ? 1.5 : 3.5} opacity={isLoss ? 0.4 : 1} />
      {isLoss ? <path d={line(main.x, main.y, sx, sy, share)} fill="none" stroke={color} strokeWidth={4.5} strokeLinejoin="round" /> : null}
      {stage.val_bpb.x.length ? (
        <g fill={CORAL} fontSize={22}>
          <text x={box.x + box.width} y={box.y - 18} textAnchor="end">bits per byte</text>
          {ticks(bits, 4).map((value) => (
            <text key={value} x={box.x + box.width + 14} y={bpb(value) + 8}>{Number(value.toFixed(2))}</text>
          ))}
        </g>
      ) : null}
      {stage.val_bpb.x.filter((step) => share >= 1 || step <= share * last).map((step, i) => (
        <g key={step}>
          <circle cx={sx(step)} cy={bpb(stage.val_bpb.y[i])} r={8} fill={CORAL} />
          {i === stage.val_bpb.x.length - 1 ? (
            <text x={box.x + box.width - 14} y={bpb(stage.val_bpb.y[i]) - 24} textAnchor="end" fontSize={25} fontWeight={600} fill={CORAL}>
              {stage.val_bpb.y[i].toFixed(4)}
            </text>
          ) : null}
        </g>
      ))}
      {share > 0 ? (
        <g>
          <circle cx={sx(main.x[at])} cy={sy(main.y[at])} r={9} fill={INK} opacity={share < 1 ? 1 : 0} />
          <text x={box.x + box.width - 14} y={top} textAnchor="end" fontSize={52} fontWeight={700} fill={color}>
            {main.y[at].toFixed(3)}
          </text>
          <text x={box.x + box.width - 14} y={top + 38} textAnchor="end" fontSize={24} fill={SOFT}>
            step {main.x[at]}, {(stage.minutes * share).toFixed(1)} min
          </text>
        </g>
      ) : null}
      <Axes box={low} sx={sx} sy={rate} x={[]} y={[0, 1]} showX={String} showY={String} labelY="learning rate" />
      {stage.lr.x.length && share > 0 ? (
        <path d={`${line(stage.lr.x, stage.lr.y, sx, rate, share)}L${sx(stage.lr.x[Math.max(0, Math.ceil(share * stage.lr.x.length) - 1)])} ${rate(0)}L${sx(stage.lr.x[0])} ${rate(0)}Z`} fill={color} fillOpacity={0.35} stroke={color} strokeWidth={2.5} />
      ) : null}
    </g>
  );
};

export const TrainingLoss: React.FC<TrainingLossProps> = (props) => {
  const progress = useProgress();
  if (!props.stages) return <Missing name="TrainingLoss" />;
  const weights = props.stages.map((stage) => (stage.stage === "base" ? 1.7 : 1));
  const whole = weights.reduce((a, b) => a + b, 0);
  const gap = 150;
  const room = WIDTH - 150 - 80 - gap * (props.stages.length - 1);
  let x = 150;
  let from = 0.8;
  const minutes = props.stages.reduce((sum, stage) => sum + stage.minutes, 0);
  return (
    <Page title="Training" below={`run ${props.tag}: ${props.stages.map((s) => s.stage).join(", ")}; ${minutes.toFixed(1)} minutes of steps`}>
      <svg width={WIDTH} height={HEIGHT} style={{ position: "absolute" }} fontFamily="inherit">
        {props.stages.map((stage, i) => {
          const box = { x, y: 235, width: (room * weights[i]) / whole, height: 555 };
          const length = (DRAWING * weights[i]) / whole;
          const share = progress(from, length);
          x += box.width + gap;
          from += length;
          return <Panel key={stage.stage} stage={stage} box={box} share={share} />;
        })}
      </svg>
    </Page>
  );
};
