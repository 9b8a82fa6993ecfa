// Left: measured runs, the best at each budget and the power law through them. Right: what --depth plans.

import React from "react";
import { Axes, Box, Missing, Page, decades, line, logarithmic, linear, ticks, useProgress } from "./parts";
import type { ScalingLawsProps } from "./props";
import { AMBER, DEPTHS, HEIGHT, INK, SOFT, WIDTH, power, short } from "./theme";

const around = (values: number[], by: number): [number, number] => [Math.min(...values) / by, Math.max(...values) * by];

const Measured: React.FC<ScalingLawsProps & { box: Box }> = ({ runs, best, law, box }) => {
  const progress = useProgress();
  const flops = around(runs.map((run) => run.flops), 1.5);
  const low = Math.min(...runs.map((run) => run.bpb));
  const high = Math.max(...runs.map((run) => run.bpb));
  const room = Math.max((high - low) * 0.15, 0.02);
  const bpb: [number, number] = [Math.max(0, low - room), high + room];
  const sx = logarithmic(flops, [box.x, box.x + box.width]);
  const sy = linear(bpb, [box.y + box.height, box.y]);
  const depths = [...new Set(runs.map((run) => run.depth))].sort((a, b) => a - b);
  const frontier = runs.filter((run) => best.includes(run.tag));
  const [first, last] = [frontier[0].flops, frontier[frontier.length - 1].flops];
  const between = Array.from({ length: 61 }, (_, i) => first * (last / first) ** (i / 60)); // the law is a curve here
  const small: Box = { ...box, y: box.y + box.height + 130, height: 130 };
  const most = law ? Math.max(...law.residuals.map(Math.abs), 1e-4) * 1.3 : 1;
  const residual = linear([-most, most], [small.y + small.height, small.y]);
  return (
    <g>
      <Axes box={box} sx={sx} sy={sy} x={decades(flops)} y={ticks(bpb, 6)} showX={power} showY={(v) => `${Number(v.toFixed(3))}`} labelX="FLOPs of the run" labelY="measured, bits per byte" />
      {depths.map((depth, i) => {
        const own = runs.filter((run) => run.depth === depth);
        const color = DEPTHS[i % DEPTHS.length];
        const share = progress(1 + i * 0.8, 1.5);
        return (
          <g key={depth} opacity={share > 0 ? 1 : 0}>
            <path d={line(own.map((r) => r.flops), own.map((r) => r.bpb), sx, sy, share)} fill="none" stroke={color} strokeWidth={3} />
            {own.map((run, j) => (
              <circle key={run.tag} cx={sx(run.flops)} cy={sy(run.bpb)} r={11 * Math.min(1, Math.max(0, share * own.length - j))} fill={color} />
            ))}
          </g>
        );
      })}
      <text x={box.x + box.width - 16} y={box.y - 18} fontSize={22} fill={SOFT} textAnchor="end">
        depth
        {depths.map((depth, i) => (
          <tspan key={depth} dx={16} fill={DEPTHS[i % DEPTHS.length]}>● <tspan fill={INK}>{depth}</tspan></tspan>
        ))}
      </text>
      {law ? (
        <g>
          <path d={line(between, between.map((c) => law.a * c ** law.b), sx, sy, progress(5, 2))} fill="none" stroke={AMBER} strokeWidth={5} strokeDasharray="14 10" />
          <Axes box={small} sx={sx} sy={residual} x={[]} y={[-most / 1.3, 0, most / 1.3]} showX={power} showY={(v) => `${(100 * v).toFixed(1)} %`} labelY={`best at a budget: ${power(law.a)} · C^${law.b.toFixed(4)}; its residuals`} />
          {frontier.map((run, i) => (
            <g key={run.tag} opacity={progress(7, 1)}>
              <line x1={sx(run.flops)} x2={sx(run.flops)} y1={residual(0)} y2={residual(law.residuals[i])} stroke={AMBER} strokeWidth={4} />
              <circle cx={sx(run.flops)} cy={residual(law.residuals[i])} r={8} fill={AMBER} />
            </g>
          ))}
        </g>
      ) : (
        <text x={small.x} y={small.y - 18} fontSize={22} fill={SOFT}>a law needs runs at three budgets or more</text>
      )}
    </g>
  );
};

const Planned: React.FC<ScalingLawsProps & { box: Box }> = ({ plan, vocab_size, box }) => {
  const progress = useProgress();
  const [x, y] = [plan.map((p) => p.parameters), plan.map((p) => p.tokens)];
  const [wide, tall]: [number, number][] = [[Math.min(...x) / 1.6, Math.max(...x) * 24], around(y, 1.7)];
  const sx = logarithmic(wide, [box.x, box.x + box.width]);
  const sy = logarithmic(tall, [box.y + box.height, box.y]);
  const share = progress(2, 6);
  return (
    <g>
      <Axes box={box} sx={sx} sy={sy} x={decades(wide)} y={decades(tall)} showX={short} showY={short} labelX="parameters" labelY={`planned by --depth (vocabulary ${vocab_size.toLocaleString("en")}): training tokens`} />
      <path d={line(x, y, sx, sy, share)} fill="none" stroke={AMBER} strokeWidth={4} />
      {plan.map((p, i) => {
        const seen = Math.min(1, Math.max(0, share * plan.length - i));
        return (
          <g key={p.depth} opacity={seen}>
            <circle cx={sx(p.parameters)} cy={sy(p.tokens)} r={11 * seen} fill={AMBER} />
            <text x={sx(p.parameters) + 22} y={sy(p.tokens) + 24} fontSize={23} fill={INK}>
              d{p.depth} <tspan fill={SOFT}>{power(p.flops)} FLOPs</tspan>
            </text>
          </g>
        );
      })}
    </g>
  );
};

export const ScalingLaws: React.FC<ScalingLawsProps> = (props) => {
  if (!props.plan) return <Missing name="ScalingLaws" />;
  const below = `${props.runs.length} finished run${props.runs.length === 1 ? "" : "s"} of this folder; every depth is one point of the plan`;
  return (
    <Page title="Scaling" below={below}>
      <svg width={WIDTH} height={HEIGHT} style={{ position: "absolute" }}>
        {props.runs.length ? <Measured {...props} box={{ x: 170, y: 250, width: 790, height: 470 }} /> : null}
        <Planned {...props} box={{ x: 1110, y: 250, width: 730, height: 700 }} />
      </svg>
    </Page>
  );
};
