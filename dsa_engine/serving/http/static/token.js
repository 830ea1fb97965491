// The access token: from the address into this tab's storage, and out of the address, the history and what is shared.

export function tokenFrom(here) {
  const token = here.searchParams.get("token") ?? sessionStorage.getItem("token");
  if (here.searchParams.has("token")) {
    here.searchParams.delete("token");
    history.replaceState(history.state, "", here);
  }
  return token;
}

export function remember(token, right) {
  if (token && right) sessionStorage.setItem("token", token);
  else sessionStorage.removeItem("token");
}

// A browser sends no header with a WebSocket, and an address would be logged.
export function subprotocols(token) {
  if (!token) return [];
  const data = btoa(String.fromCharCode(...new TextEncoder().encode(token)));
  return ["dsa-engine", `dsa-token.${data.replace(/[+]/g, "-").replace(/[/]/g, "_").replace(/=+$/, "")}`];
}
