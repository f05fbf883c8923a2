const $ = (id) => document.getElementById(id);

function headers() {
  const key = $("key").value;
  return Object.assign({ "Content-Type": "application/json" },
    key ? { Authorization: "Bearer " + key } : {});
}

async function problemOf(response) {
  try { return (await response.json()).error.message; }
  catch { return "The server answered " + response.status; }
}

// The model that this server has; null where it does not tell, and the page says why.
async function askModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    $("key-row").hidden = false;
    $("problem").textContent = "This server wants an API key.";
    return null;
  }
  if (!response.ok) { $("problem").textContent = await problemOf(response); return null; }
  $("problem").textContent = "";
  return (await response.json()).data[0];
}

function fillLegend(legend, deepest) {
  for (let depth = 0; depth <= deepest; depth++) {
    const mark = document.createElement("span");
    mark.className = "d" + depth;
    mark.textContent = depth;
    legend.append(mark);
  }
}

// A coloured cell for each patch or frame.
function depthCells(depths) {
  return depths.map((depth) => {
    const cell = document.createElement("div");
    cell.className = "d" + depth;
    cell.dataset.depth = depth;
    cell.textContent = depth;
    return cell;
  });
}
