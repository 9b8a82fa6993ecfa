// A token climbs through the stack; beside it the parameters by role.

import React from "react";
import { Missing, Page, useProgress } from "./parts";
import type { TransformerArchitectureProps } from "./props";
import { AMBER, BLUE, HEIGHT, INK, LINE, PANEL, ROLES, SOFT, TEAL, VIOLET, WIDTH, short } from "./theme";

type Row = { name: string; note: string; color: string };
const MOST = 12; // blocks that are drawn one by one

const rowsOf = (props: TransformerArchitectureProps): Row[] => {
  const { config } = props;
  const blocks = props.layers.map((layer, i) => ({
    name: `block ${i}`,
    note:
      `× ${layer.resid.toFixed(2)} ${layer.x0 < 0 ? "−" : "+"} ${Math.abs(layer.x0).toFixed(2)} x₀   window ${layer.window.toLocaleString("en")}` +
      (layer.value_embedding ? "   + value embedding" : ""),
    color: VIOLET,
  }));
  const shown =
    blocks.length <= MOST
      ? blocks
      : [...blocks.slice(0, 5), { name: `… ${blocks.length - 10} more blocks …`, note: "", color: LINE }, ...blocks.slice(-5)];
  return [
    { name: "token ids", note: "", color: SOFT },
    { name: "embedding, RMS norm", note: `${config.vocab_size.toLocaleString("en")} × ${config.n_embd}`, color: BLUE },
    { name: "smear: a little of the previous token", note: `× ${props.smear.toFixed(3)}`, color: TEAL },
    ...shown,
    { name: "minus backout of the middle, RMS norm", note: `× ${props.backout.toFixed(3)}`, color: TEAL },
    { name: "head, soft cap 15 tanh(z / 15)", note: `${config.n_embd} × ${config.vocab_size.toLocaleString("en")}`, color: AMBER },
    { name: "logits of the next token", note: "", color: SOFT },
  ];
};

const Stack: React.FC<{ rows: Row[] }> = ({ rows }) => {
  const progress = useProgress();
  const top = 190;
  const step = (HEIGHT - top - 60) / rows.length;
  const height = step * 0.74;
  const y = (i: number) => HEIGHT - 60 - (i + 1) * step + (step - height) / 2;
  const climb = progress(3.5, 5) * (rows.length - 1);
  return (
    <g>
      {rows.map((row, i) => {
        const seen = progress(0.3 + i * 0.2, 0.6);
        const lit = Math.max(0, 1 - Math.abs(climb - i)) * progress(3.4, 0.2);
        return (
          <g key={row.name + i} opacity={seen} transform={`translate(0 ${(1 - seen) * 30})`}>
            <rect x={80} y={y(i)} width={1010} height={height} rx={12} fill={row.color} fillOpacity={0.18 + 0.45 * lit} stroke={row.color} strokeWidth={2} />
            <text x={112} y={y(i) + height / 2 + 9} fontSize={26} fontWeight={600} fill={INK}>{row.name}</text>
            <text x={1062} y={y(i) + height / 2 + 8} fontSize={23} textAnchor="end" fill={INK} xmlSpace="preserve">{row.note}</text>
            {i ? <path d={`M585 ${y(i - 1) - 1} L585 ${y(i) + height + 3}`} stroke={SOFT} strokeWidth={2} /> : null}
          </g>
        );
      })}
      <circle cx={585} cy={y(0) + height / 2 - climb * step} r={13} fill={AMBER} opacity={progress(3.2, 0.3) * (1 - progress(8.6, 0.5))} />
    </g>
  );
};

const Parameters: React.FC<TransformerArchitectureProps> = (props) => {
  const progress = useProgress();
  const roles = Object.keys(ROLES).filter((role) => role in props.parameters);
  const most = Math.max(...roles.map((role) => props.parameters[role]));
  const facts = [
    `${short(props.flops_per_token)} training FLOPs a token`,
    `${props.kv_bytes_per_token.toLocaleString("en")} bytes of cache a token (bf16)`,
    `vocabulary ${props.config.vocab_size.toLocaleString("en")}, context ${props.config.sequence_len.toLocaleString("en")}`,
    `smear × ${props.smear.toFixed(3)}, backout × ${props.backout.toFixed(3)}: learnt`,
  ];
  return (
    <g>
      <rect x={1160} y={190} width={680} height={830} rx={18} fill={PANEL} />
      <text x={1200} y={250} fontSize={32} fontWeight={600} fill={INK}>Parameters by role</text>
      {roles.map((role, i) => {
        const grown = progress(1 + i * 0.5, 1.2);
        const width = 450 * (props.parameters[role] / most) * grown;
        return (
          <g key={role} transform={`translate(1200 ${295 + i * 112})`}>
            <text y={20} fontSize={24} fill={SOFT}>{role.replace("_", " ")}</text>
            <rect y={34} width={width} height={46} rx={8} fill={ROLES[role]} />
            <text x={width + 16} y={66} fontSize={26} fill={INK}>{short(props.parameters[role] * grown)}</text>
          </g>
        );
      })}
      {facts.map((fact, i) => (
        <text key={fact} x={1200} y={830 + i * 46} fontSize={25} fill={SOFT} opacity={progress(4 + i * 0.4, 0.6)}>{fact}</text>
      ))}
    </g>
  );
};

export const TransformerArchitecture: React.FC<TransformerArchitectureProps> = (props) => {
  if (!props.config) return <Missing name="TransformerArchitecture" />;
  const { config } = props;
  const below = `run ${props.tag}: ${config.n_layer} layers, ${config.n_embd} wide, ${config.n_head} heads of ${config.head_dim}, ${short(props.parameters.total)} parameters`;
  return (
    <Page title="The model" below={below}>
      <svg width={WIDTH} height={HEIGHT} style={{ position: "absolute" }}>
        <Stack rows={rowsOf(props)} />
        <Parameters {...props} />
      </svg>
    </Page>
  );
};
